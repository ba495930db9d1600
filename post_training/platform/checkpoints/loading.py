"""Loading: what a damaged checkpoint does to Megatron, and one that other layers have written.

Upstream: megatron-core 0.19.2. Every rank reads what it needs of a `torch_dist` checkpoint by itself
(`core/dist_checkpointing/strategies/torch.py`), so that one rank may fail while the others go on and wait
for it. Torch's `CheckpointException` is no `Exception`: nothing tells of it. Here ranks tell each other
after each read, and all raise `CheckpointUnreadable`, or load another checkpoint (`load_hooks`).

A checkpoint of Transformer Engine's layers is one of the local layers too, and the other way round. Both
kinds of layers give their weights the same names, with two exceptions:

- Modules of Transformer Engine have an `_extra_state` (scales of fp8, else nothing); of the local ones some
  have none, like the norms. Loading asks for all of them and raises where a checkpoint lacks one.
- `core/models/gpt/gpt_layer_specs.py` renames the norm before the experts in the local layers only: the key
  of `pre_mlp_layernorm.weight` is `mlp.linear_fc1.layer_norm_weight` there.

So what is asked for is fitted to what there is. Whatever else is missing stays an error.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from post_training.platform.patches import in_place_of

EXTRA_STATE = "_extra_state"
# The norm behind the attention, as the two kinds of layers with experts name it.
NORMS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


class CheckpointUnreadable(RuntimeError):
    """A checkpoint cannot be loaded: raised on all ranks, whichever met it. The message is one line."""


@dataclass
class LoadHooks:
    """What loading knows of the chosen checkpoint; the one instance is `load_hooks`."""

    layout: Mapping[str, int | None] | None = None
    """The layout that wrote it; None where that was not written down."""
    fall_back: Callable[[str], None] | None = None
    """Called on all ranks with what is wrong: sets the arguments to load another one, or raises."""
    under_way: bool = False
    """Whether Megatron is reading a checkpoint."""
    loaded: Callable[[], None] | None = None
    """Called on all ranks once a checkpoint is loaded as a whole."""


load_hooks = LoadHooks()


def _cause(error: BaseException) -> BaseException:
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((failure for failure, _ in failures.values()), error)


def agreed(read: Callable[..., Any]) -> Callable[..., Any]:
    """Let all ranks fail in `read` where one does; it is called on all of them.

    Memory that runs out is no fault of the checkpoint, and raised as it is.
    """

    @functools.wraps(read)
    def read_and_tell(*args: Any, **kwargs: Any) -> Any:
        problem, result, failed = None, None, None
        try:
            result = read(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
                raise cause from error
            failed = error
            # One sentence on one line; torch's go on with advice about pickles.
            said = " ".join(str(cause).split()).partition(". ")[0]
            problem = f"{type(cause).__name__}: {said[:300]}"
        told: list[str | None] = [problem]
        if torch.distributed.is_initialized():
            told = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, problem)
        for rank, each in enumerate(told):
            if each is not None:
                raise CheckpointUnreadable(f"rank {rank} cannot read it ({each})") from failed
        return result

    return read_and_tell


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
    from megatron.core.dist_checkpointing import serialization, validation
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.training import checkpointing, get_args, training
    from torch.distributed.checkpoint import FileSystemReader

    @agreed
    def tensors_in(checkpoint_dir: str) -> Collection[str]:
        found: Collection[str] = (
            FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata
        )
        return found

    @agreed
    def verify_on_rank_0(checkpoint_dir: str) -> None:
        # One that was saved without --verify-integrity has none; the manifest's sums have been compared.
        if not os.path.exists(os.path.join(checkpoint_dir, validation.INTEGRITY_FNAME)):
            return
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            validation._verify_integrity_manifest_impl(checkpoint_dir)

    @in_place_of((checkpointing, "load_checkpoint"), (training, "load_checkpoint"))
    def load_whole_one(load_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        load_hooks.under_way = True
        try:
            while True:
                try:
                    result = load_checkpoint(*args, **kwargs)
                    if load_hooks.loaded is not None:
                        load_hooks.loaded()
                    return result
                except CheckpointUnreadable as error:
                    if load_hooks.fall_back is None:
                        raise
                    traceback.print_exc()  # into the log; the message has one line of it
                    load_hooks.fall_back(str(error))
        finally:
            load_hooks.under_way = False

    @in_place_of((checkpointing, "read_metadata"))
    def chosen_or_tracked(read_metadata: Any, tracker_filename: str) -> Any:
        # Of a tracker file that cannot be read Megatron ends the process, with status 0.
        chosen = get_args().ckpt_step
        return read_metadata(tracker_filename) if chosen is None else (chosen, False)

    @in_place_of((dist_checkpointing, "load"))
    def load_what_there_is(
        load: Any,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kept = fit_to_checkpoint(sharded_state_dict, keys_of(tensors_in(checkpoint_dir)))
        loaded = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        # With some values of --dist-ckpt-strictness what differed comes along.
        state = loaded[0] if isinstance(loaded, tuple) else loaded
        for part, name, own in kept:
            state[part][name] = own
        return loaded

    common = agreed(serialization.load_common_state_dict)
    for owner, name, replacement in (
        (dist_checkpointing, "load_common_state_dict", common),
        (serialization, "load_common_state_dict", common),
        (serialization, "verify_integrity_manifest", verify_on_rank_0),
        (TorchDistLoadShardedStrategy, "load", agreed(TorchDistLoadShardedStrategy.load)),
    ):
        setattr(owner, name, replacement)
