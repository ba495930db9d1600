"""Which checkpoint a run continues from, and whether it may: it must be of the same model."""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data.prepare.prepare import DAY
from post_training.checkpoint.origin import check_origin
from post_training.checkpoint.position import DataPosition
from post_training.checkpoint.store import (
    MANIFEST,
    Checkpoint,
    chosen_checkpoint,
    iteration_of,
    latest_checkpoint,
    newest_before,
    no_older,
    point_at,
    tracked_iteration,
)
from post_training.errors import RunStopped, SetupError
from post_training.platform.checkpoints.loading import load_hooks


@dataclass(frozen=True)
class Start:
    """What a run starts from, chosen once: `complete_run` tells Megatron of it."""

    checkpoint: Checkpoint | None
    """What is loaded; None: the weights of `--hf-model`, or random ones."""
    load: str | None
    """The folder that it lies in, in the words of `--save` or `--load`."""
    finetune: bool
    """Only its weights are taken."""
    replaceable: bool
    """Whether the one before it may be taken where it is damaged: nobody has named it."""
    template_date: str | None
    """What the clock of its chat template said: its data are those of its first start."""
    asked: argparse.Namespace
    """The arguments as they were then: a checkpoint's origin is written in terms of these, and Megatron's
    validation spells some of them otherwise."""

    @property
    def continued(self) -> Checkpoint | None:
        """The checkpoint whose place in the data the run goes on from."""
        return None if self.finetune else self.checkpoint

    def flags(self) -> dict[str, Any]:
        """As `complete_run` takes it."""
        checkpoint = self.checkpoint
        return {
            "load": self.load,
            # Whatever the tracker file names.
            "ckpt_step": checkpoint and checkpoint.iteration,
            "finetune": self.finetune,
            "by_modelopt": checkpoint is not None and checkpoint.has_modelopt,
        }


def choose_checkpoint(args: argparse.Namespace) -> Start:
    """Find what to continue from.

    This run's own checkpoints come before `--load`: the same command, given again, continues.
    `--ckpt-step` belongs to `--load` where that is given.

    Raises:
        SetupError: `--load` holds no complete checkpoint, or the checkpoint is another model's, or it does
            not say where in the data it was saved.
    """
    asked = argparse.Namespace(**vars(args))
    foreign, finetune, step = args.load, args.finetune, args.ckpt_step
    if foreign and Path(foreign).resolve() == Path(args.save).resolve():
        foreign = None
    checkpoint: Checkpoint | None = None
    complaint = None
    if not (args.eval_only and foreign):  # what --eval-only is to evaluate may be named outright
        checkpoint, complaint = chosen_checkpoint(args.save, None if foreign else args.ckpt_step)
    if checkpoint is not None:
        load = args.save
        if finetune and args.rank == 0:
            print(
                f"--finetune is left out: this run has begun already and continues from "
                f"{checkpoint.path}; another --output-dir starts anew",
                file=sys.stderr,
            )
        finetune = False
        step = None if foreign else step
    elif foreign:
        load = foreign
        checkpoint, complaint = chosen_checkpoint(foreign, args.ckpt_step)
        if checkpoint is None:
            raise SetupError(
                f"--load {foreign}: holds no complete checkpoint "
                f"(no latest_checkpointed_iteration.txt){_meant(Path(foreign))}"
            )
    else:
        if finetune and args.rank == 0:
            print("--finetune changes nothing: no --load names a checkpoint", file=sys.stderr)
        return Start(None, None, finetune, replaceable=False, template_date=None, asked=asked)
    own = load == args.save
    if checkpoint.manifest is None and not (finetune or args.skip_train):
        raise SetupError(
            f"{checkpoint.path} has no {MANIFEST}, as plain Megatron writes none, and so does not say "
            f"where in which data it was saved: start from its weights with --load {load} --finetune"
            + (" and another --output-dir" if own else "")
        )
    newest = checkpoint.iteration if own and step is None else None
    if newest is not None and args.rank == 0 and not args.skip_train:
        _mend_tracker(args, newest)
    if complaint is not None and args.rank == 0:
        print(f"warning: {complaint}; continuing from {checkpoint.path}", file=sys.stderr)
    check_origin(args, checkpoint, weights_only=finetune)
    made_of = (checkpoint.manifest or {}).get("data", {}).get("made_of", ())
    day = None if finetune else next((part[DAY] for part in made_of if part.get(DAY)), None)
    return Start(
        checkpoint,
        load,
        finetune,
        replaceable=newest is not None,
        template_date=day,
        asked=asked,
    )


def expect(checkpoint: Checkpoint | None) -> None:
    """Let loading know which layout has written what it will read."""
    load_hooks.layout = ((checkpoint and checkpoint.manifest) or {}).get("layout")


class Fallback:
    """What is done on all ranks when the chosen checkpoint turns out to be damaged while it is loaded."""

    def __init__(
        self,
        args: argparse.Namespace,
        start: Start,
        position: DataPosition | None,
        console: TextIO,
    ) -> None:
        """For a run with this start; `load_hooks.fall_back` is set to `take`."""
        self.args = args
        self.checkpoint = start.checkpoint
        self.start = start
        self.position = position
        self.console = console
        expect(start.checkpoint)
        load_hooks.fall_back = self.take

    def take(self, reason: str) -> None:
        """Have the newest whole checkpoint before the damaged one loaded, in the run's own folder.

        Nothing has been trained yet, and loading overwrites all that the attempt before has read.

        This is the one place that changes validated arguments, `ckpt_step`: damage is met in the middle of
        `pretrain()`, whose `load_checkpoint` reads there which one to load. Nothing else changes: a
        checkpoint before that would need other arguments is refused.

        Args:
            reason: what is wrong with the chosen one.

        Raises:
            RunStopped: there is none before it, or another was not asked for, or it needs another model or
                another number of steps than this process has set up.
        """
        args, damaged = self.args, self.checkpoint
        assert damaged is not None
        wrong = f"{damaged.path}: {reason}"
        if not self.start.replaceable:
            raise RunStopped(f"{wrong}; restore it from a copy, or name another one by --ckpt-step")
        before = newest_before(args.save, damaged.iteration)
        if before is None or before.iteration is None:
            raise RunStopped(f"{wrong}; {no_older(args.save)}")
        same_place = True
        try:
            check_origin(self.start.asked, before)
            if self.position is not None:
                same_place = self.position.begins_at == self.position.data.begins_at(before)
        except SetupError as error:
            raise RunStopped(f"{wrong}; and of the one before: {error}") from error
        if damaged.has_modelopt or before.has_modelopt or not same_place:
            self._settle(before)
            raise RunStopped(
                f"{wrong}; give the same command again, it continues from {before.path}"
            )
        if args.rank == 0:
            print(f"warning: {wrong}; continuing from {before.path}", file=self.console)
        self.checkpoint = before
        args.ckpt_step = before.iteration
        expect(before)
        # Not before it is known to be whole: else a start that fails would lose one after the other.
        load_hooks.loaded = functools.partial(self._settle, before)

    def _settle(self, checkpoint: Checkpoint) -> None:
        """Let the tracker file name a checkpoint."""
        args, iteration = self.args, checkpoint.iteration
        if args.rank == 0 and not args.skip_train and iteration is not None:
            try:
                _mend_tracker(args, iteration)
            except SetupError as error:
                raise RunStopped(str(error)) from error


def _meant(load: Path) -> str:
    """What somebody may have meant who gave an output folder, or one checkpoint, to `--load`."""
    iteration = iteration_of(load)
    if iteration is not None and load.is_dir():
        return f": did you mean --load {load.parent} --ckpt-step {iteration}?"
    inside = load / "checkpoints"
    return f": did you mean --load {inside}?" if latest_checkpoint(inside) is not None else ""


def _mend_tracker(args: argparse.Namespace, iteration: int) -> None:
    if tracked_iteration(args.save) == iteration:
        return
    try:
        point_at(args.save, iteration)
    except OSError as error:
        raise SetupError(f"{args.save}: cannot be written ({error.strerror})") from error
