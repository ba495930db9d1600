"""Saving: room is looked for first, what was written is looked at, and only then it counts."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from post_training.checkpoint import store
from post_training.checkpoint.integrity import contents_defect
from post_training.errors import RunStopped
from post_training.job.watchdog import watchdog
from post_training.layout.model_size import checkpoint_bytes, shown_bytes
from post_training.platform.checkpoints.saving import WRITER_KILLED, reason_of, save_hooks


class CheckpointSaver:
    """Stands around every save of a run; `begin` and `finish` are called on all ranks.

    Rank 0 does what has to be done on the disk, and tells the others how it went: all go on, or all end
    with the same `RunStopped`.
    """

    def __init__(
        self, args: argparse.Namespace, facts: Callable[[], dict[str, Any]], console: TextIO
    ) -> None:
        """Take over the saves of this process.

        Args:
            args: validated arguments.
            facts: what the manifest says of the run, called when a save begins.
            console: where rank 0 says what was removed.
        """
        self.args = args
        self.facts = facts
        self.console = console
        self.saved: int | None = None
        self.best: Callable[[], int | None] = lambda: None
        """The step of the best evaluation, whose checkpoint stays."""
        self.on_complete: list[Callable[[int], None]] = []
        """Hear on rank 0 of each complete checkpoint."""
        self._facts_of: dict[int, dict[str, Any]] = {}
        save_hooks.begin = self.begin
        save_hooks.finish = self.finish

    def started(self, iteration: int) -> None:
        """The run has loaded the checkpoint of `iteration` (0: none), on all ranks."""
        if iteration and self.args.load == self.args.save:
            self.saved = iteration
        if self.args.rank == 0 and not self.args.skip_train:
            for left in store.clean_up(self.args.save):
                print(f"removed what an interrupted save of step {left} left", file=self.console)

    def begin(self, iteration: int) -> Path | None:
        """Make room for the checkpoint of `iteration`; None when it is there already.

        Raises:
            RunStopped: on all ranks, when it cannot be written.
        """
        if iteration == self.saved:
            return None
        if self.args.async_save:
            from megatron.training.async_utils import maybe_finalize_async_save

            # One at a time: results of two saves could be mistaken for each other.
            maybe_finalize_async_save(blocking=True)
        problem = None
        if self.args.rank == 0:
            save_hooks.problems.clear()
            self._facts_of[iteration] = self.facts()
            try:
                store.begin_save(self.args.save, iteration)
                problem = self._lack_of_room()
            except OSError as error:
                problem = reason_of(error)
        self._agree(iteration, problem)
        return store.mark_of(store.checkpoint_path(self.args.save, iteration))

    def finish(self, iteration: int, error: BaseException | None) -> None:
        """Declare the checkpoint of `iteration` complete, or remove it, and then remove old ones.

        Raises:
            RunStopped: on all ranks, when it could not be written as a whole.
        """
        problem = None
        if self.args.rank == 0:
            folder = store.checkpoint_path(self.args.save, iteration)
            try:
                problem = self._what_failed(error) or contents_defect(folder)
                if problem is None:
                    facts = self._facts_of.pop(iteration)
                    store.finish_save(self.args.save, iteration, facts)
            except OSError as failed:
                problem = reason_of(failed)
        self._agree(iteration, problem)
        self.saved = iteration
        if self.args.rank == 0:
            for listener in self.on_complete:
                listener(iteration)
            self._remove_old(iteration)

    def _what_failed(self, error: BaseException | None) -> str | None:
        if error is None:
            return save_hooks.problems[0] if save_hooks.problems else None
        failures = getattr(error, "failures", {})
        for rank, (failure, _) in sorted(failures.items()):
            return f"rank {rank}: {reason_of(failure, self.args.save)}"
        return reason_of(error, self.args.save)

    def _lack_of_room(self) -> str | None:
        """The size of the newest checkpoint is the size of the next; of the first, what is expected."""
        needed = checkpoint_bytes(self.args)
        newest = store.latest_checkpoint(self.args.save)
        if newest is not None and newest.manifest is not None:
            needed = sum(newest.manifest["files"].values())
        free = shutil.disk_usage(self.args.save).free
        return f"it takes {shown_bytes(needed)}, the disk is too full" if free < needed else None

    def _agree(self, iteration: int, problem: str | None) -> None:
        """Rank 0's problem becomes everybody's, once what was written is removed."""
        told: list[str | None] = [None]
        if problem is not None:
            free = shutil.disk_usage(self.args.save).free
            store.abandon_save(self.args.save, iteration)
            room = "" if WRITER_KILLED in problem else "make room and "
            told[0] = (
                f"the checkpoint of step {iteration} cannot be written to {self.args.save}: {problem} "
                f"({shown_bytes(free)} free); what was written of it is removed, {self._what_is_left()}; "
                f"{room}give the same command again"
            )
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise RunStopped(told[0])

    def _what_is_left(self) -> str:
        newest = store.latest_checkpoint(self.args.save)
        if newest is None or newest.iteration is None:
            return "there is none before it"
        return f"that of step {newest.iteration} is whole"

    def _remove_old(self, newest: int) -> None:
        try:
            store.remove_old(
                self.args.save,
                newest=newest,
                keep=self.args.keep_checkpoints,
                retain_interval=self.args.retain_interval,
                best=self.best(),
            )
        except OSError as error:
            # The new checkpoint is complete: no reason to end the run.
            print(
                f"warning: an old checkpoint in {self.args.save} cannot be removed: {error.strerror}",
                file=self.console,
            )


def finish_pending_save() -> str | None:
    """Wait for the asynchronous save that is being written, if one is; on all ranks, before they end.

    Returns:
        Why that checkpoint could not be written, or None.
    """
    from megatron.training.async_utils import maybe_finalize_async_save

    watchdog.beat("waiting for a checkpoint to be written", patient=True)
    try:
        maybe_finalize_async_save(blocking=True, terminate=True)
    except RunStopped as error:
        return str(error)
    return None
