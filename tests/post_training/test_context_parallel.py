import pytest
import torch

from post_training.context_parallel import ContextParallelCut, local_token_indices


def test_a_rank_holds_a_chunk_and_its_mirror_of_every_pack():
    ranks = [local_token_indices(2, 8, 2, rank).tolist() for rank in range(2)]
    assert ranks == [[0, 1, 6, 7, 8, 9, 14, 15], [2, 3, 4, 5, 10, 11, 12, 13]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_cost_the_same_where_a_document_fills_its_pack(size):
    costs = []
    for rank in range(size):
        cut = ContextParallelCut.make([0, 48], packs=1, seq_length=48, size=size, rank=rank)
        pieces = zip(cut.query_lengths, cut.key_lengths, strict=True)
        costs.append(sum(q * k - q * (q - 1) // 2 for q, k in pieces))
    assert set(costs) == {48 * 49 // 2 // size}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[48], [1, 2, 21, 24], [7, 17, 24], [5, 19, 1, 23]])
def test_every_query_sees_its_own_document_up_to_itself(size, lengths):
    """Found token by token: documents of any length, cut by chunks at any place."""
    packs, seq_length = 2, 24
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    gathered = torch.cat([local_token_indices(packs, seq_length, size, r) for r in range(size)])
    seen = {}
    for rank in range(size):
        cut = ContextParallelCut.make(
            bounds, packs=packs, seq_length=seq_length, size=size, rank=rank
        )
        queries = iter(cut.local_indices.tolist())
        pieces = zip(cut.query_lengths, cut.key_indices.split(cut.key_lengths), strict=True)
        for length, keys in pieces:
            in_row = gathered[keys].tolist()
            for back in range(length - 1, -1, -1):
                # Causal from the lower right corner: the last query sees all keys.
                seen[next(queries)] = in_row[: len(in_row) - back]
    for token in range(packs * seq_length):
        first = bounds[int(document[token])]
        assert seen[token] == list(range(first, token + 1))
