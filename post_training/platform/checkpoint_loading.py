"""A checkpoint of Transformer Engine's layers is one of the local layers too, and the other way round.

Upstream: megatron-core 0.19.2. Both kinds of layers give their weights the same names, with two exceptions:

- Modules of Transformer Engine have an `_extra_state` (scales of fp8, else nothing); of the local ones some
  have none, like the norms. Loading asks for all of them and raises where a checkpoint lacks one.
- `core/models/gpt/gpt_layer_specs.py` renames the norm before the experts in the local layers only: the key
  of `pre_mlp_layernorm.weight` is `mlp.linear_fc1.layer_norm_weight` there.

So what is asked for is fitted to what there is. Whatever else is missing stays an error.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

EXTRA_STATE = "_extra_state"
# The norm behind the attention, as the two kinds of layers with experts name it.
NORMS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def _in_other_words(key: str, present: Collection[str]) -> str:
    """The name by which the checkpoint has `key`, or `key` itself where it has it by neither."""
    for name, other in (NORMS, NORMS[::-1]):
        if name in key and (renamed := key.replace(name, other)) in present:
            return renamed
    return key


def fit_to_checkpoint(
    sharded: dict[str, Any], present: Collection[str]
) -> list[tuple[str, str, Any]]:
    """Ask for what a checkpoint has, in its words.

    Args:
        sharded: what is to be loaded, with the model's chunks one level down; changed in place.
        present: keys of all tensors and objects of the checkpoint.

    Returns:
        The extra states that the checkpoint lacks, which are no longer asked for: the name of the chunk,
        the name in it, and the module's own state.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    for each in nested_values(sharded):
        if (
            isinstance(each, (ShardedTensor, ShardedTensorFactory, ShardedObject))
            and each.key not in present
        ):
            each.key = _in_other_words(each.key, present)
    kept = []
    for part, chunk in sharded.items():
        for name, each in list(chunk.items()) if isinstance(chunk, dict) else ():
            # Those of experts are objects of several shards, with the key of them all.
            if (
                isinstance(each, ShardedObject)
                and each.key.endswith(EXTRA_STATE)
                and each.key not in present
            ):
                kept.append((part, name, chunk.pop(name).data))
    return kept


def keys_of(metadata_keys: Collection[str]) -> set[str]:
    """Keys of tensors and objects, of which each shard has a name of its own: `KEY/shard_0_1`.

    Megatron's own `load_sharded_metadata()` knows no key with a slash in it, as that of random states.
    """
    return {key.rpartition("/shard_")[0] or key for key in metadata_keys}


def apply() -> None:
    """Wrap the loading of distributed checkpoints."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader

    load = dist_checkpointing.load

    @functools.wraps(load)
    def load_what_there_is(
        sharded_state_dict: dict[str, Any], checkpoint_dir: str, *args: Any, **kwargs: Any
    ) -> Any:
        metadata = FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata
        kept = fit_to_checkpoint(sharded_state_dict, keys_of(metadata))
        loaded = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        # With some values of --dist-ckpt-strictness what differed comes along.
        state = loaded[0] if isinstance(loaded, tuple) else loaded
        for part, name, own in kept:
            state[part][name] = own
        return loaded

    setattr(dist_checkpointing, "load", load_what_there_is)  # noqa: B010
