from typing import Any

from tests.helpers.launch import run_ranks

# Rows that rank 0 and rank 1 send to each rank, and hold: no two are alike.
SENT = ([3, 1], [0, 5])
HELD = [4, 2]


def _uneven() -> tuple[list[float], list[float], list[float], dict[str, str]]:
    """Each rank's result of the three collectives, and what gloo says without the patches."""
    import torch
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher
    from torch import distributed

    distributed.init_process_group("gloo")
    group, rank = distributed.group.WORLD, distributed.get_rank()
    refused: dict[str, str] = {}
    sizes = [sizes[rank] for sizes in SENT]
    splits: Any = [torch.tensor(SENT[rank]), torch.tensor(sizes)]
    rows = torch.arange(sum(SENT[rank])).float()[:, None] + 10 * rank
    received = torch.empty(sum(sizes), 1)
    try:
        distributed.all_to_all_single(received, rows, splits[1], splits[0])
    except TypeError as error:
        refused["all to all"] = str(error)
    sent, got = (token_dispatcher.maybe_move_tensor_to_cpu(s, as_numpy=True) for s in splits)
    exchanged = mappings.all_to_all(group, rows, got, sent)

    part = torch.arange(HELD[rank]).float()[:, None] + 10 * rank
    gathered = mappings.gather_from_sequence_parallel_region(
        part, group=group, output_split_sizes=HELD
    )
    nothing = mappings.gather_from_sequence_parallel_region(
        part[:0], group=group, output_split_sizes=[0, 0]
    )
    assert nothing.shape == (0, 1)
    kept = mappings.reduce_scatter_to_sequence_parallel_region(
        gathered, group=group, input_split_sizes=HELD
    )
    try:
        parts = [torch.empty(size, 1) for size in HELD]
        distributed.all_gather(parts, part, group=group)
    except RuntimeError as error:
        refused["gather"] = str(error)
    return (*(x.flatten().tolist() for x in (exchanged, gathered, kept)), refused)


def test_parts_of_different_sizes():
    first, second = run_ranks(_uneven, 2)
    assert (first[0], second[0]) == ([0, 1, 2], [3, 10, 11, 12, 13, 14])
    assert first[1] == second[1] == [0, 1, 2, 3, 10, 11]
    # Both ranks held the same whole: each part is there twice.
    assert (first[2], second[2]) == ([0, 2, 4, 6], [20, 22])


def test_still_needed_gloo_wants_numbers_and_parts_of_one_size(upstream):
    assert upstream["split sizes"] == "Tensor"
    for *_, refused in run_ranks(_uneven, 2):
        assert "incompatible function arguments" in refused["all to all"]
        assert "invalid tensor size" in refused["gather"]
