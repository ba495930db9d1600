"""Saving and loading the distributed optimizer's state with the memory of one share of it.

Upstream: megatron-core 0.19.2, `core/optimizer/distrib_optimizer.py`,
`sharded_param_state_fully_reshardable()`, which is what lets a checkpoint be resumed with another number of
data parallel ranks. To save, it gathers the state of all parameters on every rank: 12 bytes a parameter on
each rank's host, and 4 on its GPU (with `--distrib-optim-fully-reshardable-mem-efficient` on the first
rank's host alone, through gloo). To load, every rank reads the whole. And it looks for a parameter
at its place in a buffer with the padding between buckets in one that has none: with several buckets
(`--overlap-grad-reduce`) and sizes that need padding, what it writes is shifted.

Here a rank writes parameters of which a part lies in its share of the buffer, about as many elements as
others do: those that lie in it whole as they are, and of the others it gets the rest. It reads all that it
has a part of. What is on the disk stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from post_training.machine.device import current_device
from post_training.platform.patches import in_place_of

# Of a broadcast, in elements: 256 MiB on the GPU.
PIECE = 2**26


def apply() -> None:
    """Replace the gathering."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @in_place_of((DistributedOptimizer, "sharded_param_state_fully_reshardable"))
    def shard(
        upstream: Any, self: Any, model: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        return share_of_state(self, model, is_loading)


def share_of_state(optimizer: Any, model: Any, is_loading: bool) -> dict[int, dict[str, Any]]:
    """What this rank writes, or reads, of the state; all data parallel ranks call it together.

    Args:
        optimizer: a `DistributedOptimizer`.
        model: the model's sharded state dictionary, whose places and shapes the state shares.
        is_loading: memory to be read into is returned.

    Returns:
        By the number of the parameter (in the order of the buffers) and the name of the state, a
        `ShardedTensor` or `ShardedTensorFactory` of the parameter's shape in fp32.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    places = {
        place.data: place
        for place in nested_values(extract_sharded_tensors_and_factories(model)[0])
    }
    rank = optimizer.data_parallel_group.rank()
    names = ("param", *optimizer.optimizer_state_keys)
    share: dict[int, dict[str, Any]] = {}
    for number, (parameter, ends, owner) in enumerate(_spans(optimizer)):
        if is_loading:
            if rank not in ends:
                continue
            whole = {name: torch.empty(parameter.numel()) for name in names}
        else:
            whole = _whole(optimizer, parameter, ends, owner, names)
            if rank != owner:
                continue
        place = places[parameter]
        share[number] = {}
        for name, values in whole.items():
            changes: dict[str, Any] = {
                "key": f"optimizer.state.{name}.{place.key}",
                "data": values.view(place.data.shape),
                # Others of this group may read the same parameter: one of them stands for all.
                "replica_id": (*place.replica_id[:2], int(rank != owner)),
            }
            if not isinstance(place, ShardedTensorFactory):
                changes["dtype"] = values.dtype
            share[number][name] = replace(place, **changes)
            share[number][name].validate_metadata_integrity()
    return share


def _spans(optimizer: Any) -> Iterator[tuple[Tensor, dict[int, tuple[int, int]], int]]:
    """Each parameter, which part of it each rank keeps, and the rank that writes it.

    Yields:
        A parameter; by data parallel rank the first and the last element (exclusive) that it keeps; and of
        these ranks the one that has least to write so far.
    """
    ranks = optimizer.data_parallel_group.size()
    writes = [0] * ranks
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_number]
            size = bucket.grad_data.numel() // ranks
            first, last = start - bucket.offset, end - bucket.offset
            ends = {
                rank: (max(first, rank * size) - first, min(last, (rank + 1) * size) - first)
                for rank in range(first // size, (last - 1) // size + 1)
            }
            owner = min(ends, key=writes.__getitem__)
            writes[owner] += end - start
            yield parameter, ends, owner


def _whole(
    optimizer: Any,
    parameter: Tensor,
    ends: dict[int, tuple[int, int]],
    owner: int,
    names: tuple[str, ...],
) -> dict[str, Tensor]:
    """A parameter's state, flat, on the rank that writes it; elsewhere nothing that can be used.

    A parameter that lies in one rank's share is not copied, and stays on its device.
    """
    group = optimizer.data_parallel_group
    rank = group.rank()
    own: dict[str, Tensor] = {}
    if rank in ends:
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        own = {name: states[name].detach().float() for name in names}
    if len(ends) == 1:
        return own
    whole = {name: torch.empty(parameter.numel()) for name in names} if rank == owner else {}
    for source, (begin, end) in ends.items():
        for name in names:
            if rank == owner == source:
                whole[name][begin:end].copy_(own[name])
            elif source != owner:
                # All ranks of the group take part: no connections but those there are.
                for at in range(begin, end, PIECE):
                    to = min(end, at + PIECE)
                    if rank == source:
                        piece = own[name][at - begin : to - begin].to(current_device()).contiguous()
                    else:
                        piece = torch.empty(to - at, device=current_device())
                    torch.distributed.broadcast(
                        piece, torch.distributed.get_global_rank(group, source), group
                    )
                    if rank == owner:
                        whole[name][at:to].copy_(piece)
    return whole
