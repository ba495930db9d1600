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

from post_training.machine.disk import room_reason


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
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        current = current.__cause__ or current.__context__
    text = str(error) or type(error).__name__
    if _KILLED in text:
        return WRITER_KILLED
    return room_reason(folder) if folder is not None and _CUT_OFF.search(text) else text


def _noting_problems(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def write(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            if save_hooks.finish is None:
                raise
            save_hooks.problems.append(reason_of(error))
            return None

    return write


def _apply_to_writer() -> None:
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write_bucket = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write_bucket)
    def write_with_reason(*args: Any, **kwargs: Any) -> Any:
        output = write_bucket(*args, **kwargs)
        failed = isinstance(output[1], Exception)
        if failed and kwargs.get("results_queue") is None:
            # The caller puts an exception into words, but of one that is returned only the type.
            raise OSError(reason_of(output[1]))
        return output

    for owner, name, replacement in (
        (FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_with_reason)),
        (FileSystemWriterAsync, "finish", _noting_problems(FileSystemWriterAsync.finish)),
        (serialization, "save_config", _noting_problems(serialization.save_config)),
    ):
        setattr(owner, name, replacement)


def apply() -> None:
    """Put `save_hooks` around every save; without hooks Megatron does as before."""
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args

    _apply_to_writer()
    save_checkpoint = checkpointing.save_checkpoint
    tracker_filename = checkpointing.get_checkpoint_tracker_filename
    schedule_async_save = checkpointing.schedule_async_save
    # The iteration that is being saved, and the file that stands for the tracker meanwhile.
    saving: list[tuple[int, Path]] = []

    @functools.wraps(save_checkpoint)
    def save_between_hooks(iteration: int, *args: Any, **kwargs: Any) -> None:
        if save_hooks.begin is None or save_hooks.finish is None:
            save_checkpoint(iteration, *args, **kwargs)
            return
        stand_in = save_hooks.begin(iteration)
        if stand_in is None:
            return
        error: BaseException | None = None
        saving.append((iteration, stand_in))
        try:
            save_checkpoint(iteration, *args, **kwargs)
        except CheckpointException as caught:  # raised on all ranks
            error = caught
        finally:
            saving.clear()
        if error is not None or not get_args().async_save:
            save_hooks.finish(iteration, error)

    @functools.wraps(tracker_filename)
    def tracker_or_stand_in(folder: str) -> str:
        return str(saving[0][1]) if saving else str(tracker_filename(folder))

    @functools.wraps(schedule_async_save)
    def schedule_with_finish(request: Any) -> None:
        finish = save_hooks.finish
        if not saving or finish is None:
            schedule_async_save(request)
            return
        iteration, functions = saving[0][0], list(request.finalize_fns)

        def finalize() -> None:
            error: BaseException | None = None
            try:
                for function in functions:
                    function()
            except CheckpointException as caught:
                error = caught
            finish(iteration, error)

        schedule_async_save(request._replace(finalize_fns=[finalize]))

    for owner, name, replacement in (
        (training, "save_checkpoint", save_between_hooks),
        (checkpointing, "save_checkpoint", save_between_hooks),
        (checkpointing, "get_checkpoint_tracker_filename", tracker_or_stand_in),
        (checkpointing, "schedule_async_save", schedule_with_finish),
    ):
        setattr(owner, name, replacement)
