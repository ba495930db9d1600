"""Megatron declares a checkpoint complete by itself, and not in a way that survives a kill or a full disk.

Upstream: megatron-core 0.19.2.

- `training/checkpointing.py`: `save_checkpoint()` opens the tracker file for writing and then writes into
  it, so that a kill in between leaves it empty. There is no place between the last file of a checkpoint and
  the tracker to look at what has been written. It writes over a complete checkpoint of the same iteration.
- `core/dist_checkpointing/strategies/filesystem_async.py`: an error while tensors are written reaches the
  other ranks without its reason (`write_preloaded_data_multithread` keeps its type only), and one while
  `.metadata` (`FileSystemWriterAsync.finish`) or `metadata.json` (`serialization.save_config`) is written
  is raised on rank 0 alone, for which the others then wait.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from post_training.machine.disk import room_reason, system_errors
from post_training.platform.patches import in_place_of


@dataclass
class SaveHooks:
    """What to call around a save, on every rank; the one instance is `save_hooks`."""

    begin: Callable[[int], Path | None] | None = None
    """Given the iteration, makes its folder and returns a file that Megatron may write the iteration
    into in place of the tracker file; None when there is nothing to save."""
    finish: Callable[[int, BaseException | None], None] | None = None
    """Given the iteration and the error that all ranks met, if any: publishes the checkpoint. Called
    after the last file has been written, in an asynchronous save some steps later."""
    problems: list[str] = field(default_factory=list)
    """What this rank alone failed to write in the save that is going on."""
    there_already: bool = False
    """The last save that was asked for wrote nothing: its checkpoint is there."""


save_hooks = SaveHooks()


# torch's zip writer, when it finds less written than it meant to; the system's error is lost in C++.
_CUT_OFF = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos")
# Megatron finds no answer of the background process that wrote.
_KILLED = "results_queue should not be empty"
WRITER_KILLED = (
    "the process that wrote it was killed, most often for want of memory (the kernel's log, `dmesg`, "
    "tells)"
)


def reason_of(error: BaseException, folder: str | None = None) -> str:
    """Why a write failed: torch's writer hides the system's error behind its own.

    Args:
        error: what was raised.
        folder: what was written to; its disk is asked where the error itself does not tell.
    """
    for each in system_errors(error):
        if each.strerror:
            return each.strerror
    text = str(error) or type(error).__name__
    if _KILLED in text:
        return WRITER_KILLED
    return room_reason(folder) if folder is not None and _CUT_OFF.search(text) else text


def _noting_problems(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return write(*args, **kwargs)
    except OSError as error:
        if save_hooks.finish is None:
            raise
        save_hooks.problems.append(reason_of(error))
        return None


def apply() -> None:
    """Put `save_hooks` around every save; without hooks Megatron does as before."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args

    @in_place_of((FileSystemWriterAsync, "write_preloaded_data"))
    def write_with_reason(write: Any, *args: Any, **kwargs: Any) -> Any:
        output = write(*args, **kwargs)
        failed = isinstance(output[1], Exception)
        if failed and kwargs.get("results_queue") is None:
            # The caller puts an exception into words, but of one that is returned only the type.
            raise OSError(reason_of(output[1]))
        return output

    in_place_of((FileSystemWriterAsync, "finish"))(_noting_problems)
    in_place_of((serialization, "save_config"))(_noting_problems)

    # The iteration that is being saved, and the file that stands for the tracker meanwhile.
    saving: list[tuple[int, Path]] = []

    def error_of(*steps: Callable[[], None]) -> CheckpointException | None:
        try:
            for step in steps:
                step()
        except CheckpointException as error:  # raised on all ranks
            return error
        return None

    @in_place_of((checkpointing, "save_checkpoint"), (training, "save_checkpoint"))
    def save_between_hooks(save_checkpoint: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        save = functools.partial(save_checkpoint, iteration, *args, **kwargs)
        if save_hooks.begin is None or save_hooks.finish is None:
            return save()
        stand_in = save_hooks.begin(iteration)
        save_hooks.there_already = stand_in is None
        if stand_in is None:
            return None
        saving.append((iteration, stand_in))
        try:
            error = error_of(save)
        finally:
            saving.clear()
        if error is not None or not get_args().async_save:
            save_hooks.finish(iteration, error)
        return None

    @in_place_of((checkpointing, "get_checkpoint_tracker_filename"))
    def tracker_or_stand_in(tracker_filename: Any, folder: str) -> str:
        return str(saving[0][1]) if saving else str(tracker_filename(folder))

    @in_place_of((checkpointing, "schedule_async_save"))
    def schedule_with_finish(schedule_async_save: Any, request: Any) -> None:
        finish = save_hooks.finish
        if saving and finish is not None:
            iteration, functions = saving[0][0], list(request.finalize_fns)

            def finalize() -> None:
                finish(iteration, error_of(*functions))

            request = request._replace(finalize_fns=[finalize])
        schedule_async_save(request)
