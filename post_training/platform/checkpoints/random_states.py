"""A checkpoint keeps one random state for all data parallel ranks.

Upstream: megatron-core 0.19.2, `training/checkpointing.py`: `get_rng_state()` saves what data parallel rank
0 holds of each (pipeline, tensor) rank; the others, and context parallel ranks, get its state when they
load. Attention over packed documents draws as many numbers as its documents are long, so the states of
ranks with different packs part at the first step, and a resumed run would drop other units than the
uninterrupted one. Here every rank saves its own state, under its own key, and takes it back in the same
layout; in another layout there is no state that would be right, and the fresh ones of this start stay.
This key holds a slash, which Megatron does not expect where it lists what a checkpoint holds (as it does
for ModelOpt).
"""

from __future__ import annotations

from typing import Any

from post_training.platform.checkpoints.loading import load_hooks
from post_training.platform.checkpoints.saving import save_hooks
from post_training.platform.patches import in_place_of

LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def layout_of(args: Any) -> dict[str, int | None]:
    """What decides which rank computes what."""
    return {name: getattr(args, name) for name in LAYOUT}


def apply() -> None:
    """Let `get_rng_state()` give a state of each rank for `torch_dist` checkpoints with a manifest."""
    import torch
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
    from megatron.training import checkpointing
    from megatron.training.global_vars import get_args

    @in_place_of((checkpointing, "get_rng_state"))
    def state_of_this_rank(get_rng_state: Any, ckpt_format: str, *args: Any, **kwargs: Any) -> Any:
        shared = get_rng_state(ckpt_format, *args, **kwargs)
        if ckpt_format != "torch_dist" or not torch.distributed.is_initialized():
            return shared
        if load_hooks.under_way:
            if load_hooks.layout is None:
                return shared
            if load_hooks.layout != layout_of(get_args()):
                return LocalNonpersistentObject(shared.data)
        elif save_hooks.finish is None:
            return shared  # no manifest will say which layout this is
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        return ShardedObject(f"{shared.key}/rank", shared.data, (world,), (rank,), replica_id=0)

    listed = ShardedObject.empty_from_unique_key

    def with_slashes(unique_key: str, replica_id: Any = 0) -> ShardedObject:
        key, place = unique_key.rsplit("/", 1)
        found = listed(f"{key.replace('/', '.')}/{place}", replica_id)
        found.key = key
        return found

    ShardedObject.empty_from_unique_key = staticmethod(with_slashes)
