import functools
import os
from types import SimpleNamespace

import pytest
import torch

from post_training.batch.assemble import (
    DOCUMENT_FIELDS,
    TOKEN_FIELDS,
    assemble_batch,
    join_stage_input,
    shift_labels,
    split_stage_output,
)
from tests.helpers.launch import run_ranks
from tests.helpers.packs import make_pack, stacked

IDS = torch.tensor([10, 11, 12, 13, 20, 21, 22, 30])
LENGTHS = [4, 3, 1]


def test_a_token_is_trained_as_the_label_of_the_one_before_it():
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.uint8)
    labels, label_mask = shift_labels(IDS, mask, LENGTHS)
    assert label_mask.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert labels[label_mask.bool()].tolist() == [12, 13, 21]


def test_the_last_token_of_a_document_has_no_label():
    """Reference's fault: with a mask of ones it predicts the next document's first token."""
    _, label_mask = shift_labels(IDS, torch.ones(8, dtype=torch.uint8), LENGTHS)
    assert label_mask.tolist() == [1, 1, 1, 0, 1, 1, 0, 0]


def test_assembled_batch():
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0])
    groups = torch.tensor([5, 5, 5, 5, 9, 9, 9, 7])
    batch = assemble_batch(stacked([make_pack(IDS, mask, LENGTHS, groups)]), qkv_format="sbhd")
    assert batch.tokens.tolist() == [IDS.tolist()]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.packed.query_lengths == [4, 3, 1]
    assert batch.trained.indices.tolist() == [1, 2, 4]
    assert batch.trained.weights.tolist() == [1, 1, 1]
    assert batch.trained.groups.tolist() == [5, 5, 9]
    assert batch.labels.shape == (1, 8)


def test_a_context_parallel_rank_keeps_its_part_with_the_labels_of_the_whole_row():
    packs = stacked([make_pack(IDS, torch.ones_like(IDS), LENGTHS, IDS // 10)])
    one, two = (
        assemble_batch(packs, qkv_format="sbhd", cp_size=2, cp_rank=rank) for rank in range(2)
    )
    assert one.tokens.tolist() == [[10, 11, 22, 30]]
    assert two.tokens.tolist() == [[12, 13, 20, 21]]
    assert one.position_ids.tolist() == [[0, 1, 2, 0]]
    # The label of 11 is the other rank's first token; 13, 22 and 30 end their documents.
    assert one.labels[0, one.trained.indices].tolist() == [11, 12]
    assert two.labels[0, two.trained.indices].tolist() == [13, 21, 22]
    assert one.trained.groups.tolist() == [1, 1] and two.trained.groups.tolist() == [1, 2, 2]
    assert one.packed.query_lengths == [2, 1, 1] and one.packed.key_lengths == [2, 3, 1]
    assert two.packed.query_lengths == [2, 2] and two.packed.key_lengths == [4, 2]


def _read_on_ranks() -> tuple[list[list[int]], list[int] | None, str]:
    """Rank 0 of the tensor parallel group has data, rank 1 has none."""
    from megatron.core import parallel_state

    from post_training.batch.assemble import read_batch

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    data = stacked(
        [
            make_pack(row + 100, (row % 3 == 0).to(torch.uint8), [4, 4], row)
            for row in torch.arange(16).view(2, 8)
        ]
    )
    reads = os.environ["RANK"] == "0"
    read = functools.partial(read_batch, seq_length=8, qkv_format="sbhd")
    batch = read(iter([data]) if reads else None, micro_batch_size=2)
    try:
        read(iter([data]), micro_batch_size=3)
        error = ""
    except ValueError as wrong:
        error = str(wrong)
    found = batch.tokens[0], batch.trained.indices, batch.trained.groups, batch.position_ids[0]
    return [each.tolist() for each in found], batch.packed.query_lengths, error


def test_every_tensor_parallel_rank_gets_what_rank_0_read():
    one, two = run_ranks(_read_on_ranks, 2)
    assert one == two
    (tokens, trained, groups, positions), lengths, error = one
    assert tokens == list(range(100, 116))
    # Trained are 3, 6, 9, 15 (0 and 12 begin documents); each is the label of the one before.
    assert trained == [2, 5, 8, 14] and groups == [3, 6, 9, 15]
    assert positions == [0, 1, 2, 3] * 4 and lengths == [4] * 4
    fields = len(TOKEN_FIELDS + DOCUMENT_FIELDS)
    assert f"({fields}, 2, 8)" in error and f"({fields}, 3, 8)" in error


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_what_a_stage_sends_is_what_the_next_joins(micro):
    """Reference's fault: micro batch 1 only."""
    output = torch.arange(8 * 3.0).view(8, 1, 3)
    sent = split_stage_output(output, micro)
    assert sent.shape == (8 // micro, micro, 3)
    assert sent.data_ptr() == output.data_ptr()
    held: dict[str, torch.Tensor] = {"input": sent}
    decoder = SimpleNamespace(
        input_tensor=sent, set_input_tensor=lambda tensor: held.update(input=tensor)
    )
    join_stage_input(SimpleNamespace(decoder=decoder))
    assert torch.equal(held["input"], output)


def test_a_stage_without_input_is_left_alone():
    join_stage_input(SimpleNamespace(decoder=SimpleNamespace(input_tensor=None)))
