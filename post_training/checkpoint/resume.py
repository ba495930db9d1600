"""Which checkpoint a run continues from, and whether it may: it must be of the same model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

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


def choose_checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    """Set `args.load` and `args.ckpt_step` to what to continue from, and return that checkpoint.

    This run's own checkpoints come before `--load`: the same command, given again, continues.
    `--ckpt-step` belongs to `--load` where that is given.

    Raises:
        SetupError: `--load` holds no complete checkpoint, or the checkpoint is another model's, or it does
            not say where in the data it was saved.
    """
    load_hooks.layout, args.modelopt_enabled = None, False
    foreign = args.load
    if foreign and Path(foreign).resolve() == Path(args.save).resolve():
        foreign = None
    checkpoint: Checkpoint | None = None
    complaint = None
    if not (args.eval_only and foreign):  # what --eval-only is to evaluate may be named outright
        checkpoint, complaint = chosen_checkpoint(args.save, None if foreign else args.ckpt_step)
    if checkpoint is not None:
        args.load = args.save
        if args.finetune and args.rank == 0:
            print(
                f"--finetune is left out: this run has begun already and continues from "
                f"{checkpoint.path}; another --output-dir starts anew",
                file=sys.stderr,
            )
        args.finetune = False
        if foreign:
            args.ckpt_step = None
    elif foreign:
        args.load = foreign
        checkpoint, complaint = chosen_checkpoint(foreign, args.ckpt_step)
        if checkpoint is None:
            raise SetupError(
                f"--load {foreign}: holds no complete checkpoint "
                f"(no latest_checkpointed_iteration.txt){_meant(Path(foreign))}"
            )
    else:
        args.load = None
        return None
    if checkpoint.manifest is None and not (args.finetune or args.skip_train):
        raise SetupError(
            f"{checkpoint.path} has no {MANIFEST}, as plain Megatron writes none, and so does not say "
            f"where in which data it was saved: start from its weights with --load {args.load} --finetune"
            + (" and another --output-dir" if args.load == args.save else "")
        )
    if args.ckpt_step is None and checkpoint.iteration is not None:
        args.in_output_dir.append("ckpt_step")  # config.yaml does not keep it
        if args.load == args.save and args.rank == 0 and not args.skip_train:
            _mend_tracker(args, checkpoint.iteration)
    if complaint is not None and args.rank == 0:
        print(f"warning: {complaint}; continuing from {checkpoint.path}", file=sys.stderr)
    check_origin(args, checkpoint)
    _take(args, checkpoint)
    return checkpoint


def _take(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Let Megatron load this one, whatever its tracker file names."""
    args.ckpt_step = checkpoint.iteration
    if args.template_date is None and not args.finetune:
        # The data are those of the first start, whatever day it is now.
        made_of = (checkpoint.manifest or {}).get("data", {}).get("made_of", ())
        args.template_date = next((part[DAY] for part in made_of if part.get(DAY)), None)
    args.modelopt_enabled = checkpoint.has_modelopt
    load_hooks.layout = (checkpoint.manifest or {}).get("layout")


class Fallback:
    """What is done on all ranks when the chosen checkpoint turns out to be damaged while it is loaded."""

    def __init__(
        self,
        args: argparse.Namespace,
        checkpoint: Checkpoint | None,
        position: DataPosition | None,
        console: TextIO,
    ) -> None:
        """For a run that continues from `checkpoint`; `load_hooks.fall_back` is set to `take`."""
        self.args = args
        self.checkpoint = checkpoint
        self.position = position
        self.console = console
        load_hooks.fall_back = self.take

    def take(self, reason: str) -> None:
        """Have the newest whole checkpoint before the damaged one loaded, in the run's own folder.

        Nothing has been trained yet, and loading overwrites all that the attempt before has read.

        Args:
            reason: what is wrong with the chosen one.

        Raises:
            RunStopped: there is none before it, or another was not asked for, or it needs another model or
                another number of steps than this process has set up.
        """
        args, damaged = self.args, self.checkpoint
        assert damaged is not None
        wrong = f"{damaged.path}: {reason}"
        if args.load != args.save or "ckpt_step" not in args.in_output_dir:
            raise RunStopped(f"{wrong}; restore it from a copy, or name another one by --ckpt-step")
        before = newest_before(args.save, damaged.iteration)
        if before is None or before.iteration is None:
            raise RunStopped(f"{wrong}; {no_older(args.save)}")
        begins_at = args.data_begins_at
        try:
            check_origin(args, before)
            if self.position is not None:
                self.position.check(before)
            if args.rank == 0 and not args.skip_train:
                _mend_tracker(args, before.iteration)
        except SetupError as error:
            raise RunStopped(f"{wrong}; and of the one before: {error}") from error
        if damaged.has_modelopt or before.has_modelopt or args.data_begins_at != begins_at:
            raise RunStopped(
                f"{wrong}; give the same command again, it continues from {before.path}"
            )
        if args.rank == 0:
            print(f"warning: {wrong}; continuing from {before.path}", file=self.console)
        self.checkpoint = before
        _take(args, before)


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
