"""Which checkpoint a run continues from, and whether it may: it must be of the same model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from post_training.checkpoint_origin import check_origin
from post_training.checkpoints import (
    chosen_checkpoint,
    iteration_of,
    latest_checkpoint,
    point_at,
    tracked_iteration,
)
from post_training.errors import SetupError


def choose_checkpoint(args: argparse.Namespace) -> Path | None:
    """Set `args.load` and `args.ckpt_step` to what to continue from, and return that checkpoint.

    This run's own checkpoints come before `--load`: the same command, given again, continues.
    `--ckpt-step` belongs to `--load` where that is given.

    Raises:
        SetupError: `--load` holds no complete checkpoint, or the checkpoint is another model's.
    """
    foreign = args.load
    if foreign and Path(foreign).resolve() == Path(args.save).resolve():
        foreign = None
    checkpoint, complaint = None, None
    if not (args.eval_only and foreign):  # what --eval-only is to evaluate may be named outright
        checkpoint, complaint = chosen_checkpoint(args.save, None if foreign else args.ckpt_step)
    if checkpoint is not None:
        args.load = args.save
        args.finetune = False  # --finetune is about --load: this run has begun already
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
    iteration = iteration_of(checkpoint)
    if args.ckpt_step is None and iteration is not None:
        # Megatron then loads this one, whatever its tracker file names; config.yaml does not keep it.
        args.ckpt_step = iteration
        args.in_output_dir.append("ckpt_step")
        if args.load == args.save and args.rank == 0 and not args.skip_train:
            _mend_tracker(args, iteration)
    if complaint is not None and args.rank == 0:
        print(f"warning: {complaint}; continuing from {checkpoint}", file=sys.stderr)
    check_origin(args, checkpoint)
    return checkpoint


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
