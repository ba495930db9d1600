import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.batch.context_parallel import ContextParallelCut, owners


def row(lengths, size):
    """Bounds of documents, with a last one that fills the row to a multiple of 2 * size."""
    total = sum(lengths)
    filled = [*lengths, *([-total % (2 * size)] if total % (2 * size) else [])]
    return [0, *torch.tensor(filled).cumsum(0).tolist()]


def test_a_rank_holds_a_chunk_and_its_mirror_of_every_document():
    assert owners([0, 8, 12], 2, tile=1).tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]


def test_spare_tokens_go_to_the_ranks_that_hold_fewest():
    # 5 = 1 + 1 + 1 + 1 and one to rank 0; 7 = 1 + 1 + 1 + 1 and one to rank 1, 0, 1.
    found = owners([0, 5, 12], 2, tile=1).tolist()
    assert found == [0, 0, 1, 1, 0] + [0, 0, 1, 1, 1, 1, 0]


def test_short_neighbours_are_cut_as_one():
    assert owners([0, 3, 8, 24], 2, tile=4).tolist() == [0, 0, 1, 1, 1, 1, 0, 0] + (
        [0] * 4 + [1] * 8 + [0] * 4
    )


@settings(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 8))
def test_all_ranks_hold_equally_many_tokens(lengths, size, tile):
    bounds = row(lengths, size)
    counts = torch.bincount(owners(bounds, size, tile), minlength=size)
    assert counts.tolist() == [bounds[-1] // size] * size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_attention_costs_all_ranks_about_the_same(size):
    """Documents of very different lengths: no rank has a tenth more than the mean."""
    bounds = row([4096, 300, 2000, 17, 17, 1200, 900], size)
    costs = []
    for rank in range(size):
        cut = ContextParallelCut.make(bounds, size=size, rank=rank)
        pieces = zip(cut.query_lengths, cut.key_lengths, strict=True)
        costs.append(sum(q * k - q * (q - 1) // 2 for q, k in pieces))
    assert sum(costs) == sum(
        length * (length + 1) // 2
        for length in (b - a for a, b in zip(bounds, bounds[1:], strict=False))
    )
    assert max(costs) < 1.1 * sum(costs) / size


@settings(max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 8))
def test_every_query_sees_its_own_document_up_to_itself(lengths, size, tile):
    """Found token by token: documents of any length, cut at any place."""
    bounds = row(lengths, size)
    cuts = [ContextParallelCut.make(bounds, size=size, rank=r, tile=tile) for r in range(size)]
    gathered = torch.cat([cut.local_indices for cut in cuts])
    seen = {}
    for cut in cuts:
        queries = iter(cut.local_indices.tolist())
        pieces = zip(cut.query_lengths, cut.key_indices.split(cut.key_lengths), strict=True)
        for length, keys in pieces:
            in_row = gathered[keys].tolist()
            for back in range(length - 1, -1, -1):
                # Causal from the lower right corner: the last query sees all keys.
                seen[next(queries)] = in_row[: len(in_row) - back]
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        for token in range(first, end):
            assert seen[token] == list(range(first, token + 1))
