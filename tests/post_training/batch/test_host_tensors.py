from typing import Any

import torch

from post_training.batch.assemble import assemble_batch
from post_training.batch.host_tensors import host_group, to_device
from tests.helpers.launch import run_ranks
from tests.helpers.packs import make_pack, stacked

META = torch.device("meta")


def test_every_tensor_of_a_batch_is_moved_and_one_that_is_named_twice_only_once():
    packs = stacked([make_pack(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 1, 0, 1]), [2, 2])])
    for cp_size in (1, 2):
        batch = assemble_batch(packs, qkv_format="sbhd", cp_size=cp_size, experts=True)
        moved = to_device(batch, META)
        held = [*vars(moved).values(), *vars(moved.packed).values()]
        held += [*vars(moved.trained).values(), *vars(moved.packed.routed).values()]
        tensors = [each for each in held if isinstance(each, torch.Tensor)]
        # The keys of context parallelism are one more.
        assert len(tensors) == (14 if cp_size == 1 else 15)
        assert all(each.device == META for each in tensors)
        assert moved.packed.query_lengths == batch.packed.query_lengths
        assert moved.packed.max_seqlen_q == batch.packed.max_seqlen_q
        same = moved.packed.cu_seqlens_q is moved.packed.cu_seqlens_kv
        assert same == (batch.packed.cu_seqlens_q is batch.packed.cu_seqlens_kv)


def test_on_a_cpu_nothing_is_copied():
    packs = stacked([make_pack(torch.tensor([5, 6]), torch.tensor([0, 1]), [2])])
    batch = assemble_batch(packs, qkv_format="sbhd")
    assert to_device(batch, torch.device("cpu")) is batch


def _broadcast_beside_another_backend() -> tuple[list[int], bool, bool]:
    import torch.testing._internal.distributed.fake_pg

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    # Like NCCL it carries no tensor of the host: its collectives do nothing at all.
    other: Any = torch.distributed.new_group([0, 1], backend="fake")
    values = torch.arange(3) * (1 - rank)
    torch.distributed.broadcast(values, 0, group=host_group(other))
    gloo = torch.distributed.group.WORLD
    assert gloo is not None
    return values.tolist(), host_group(other) is host_group(other), host_group(gloo) is gloo


def test_tensors_of_the_host_travel_whatever_the_backend_of_the_group():
    for values, made_once, itself in run_ranks(_broadcast_beside_another_backend, 2):
        assert values == [0, 1, 2]
        assert made_once and itself
