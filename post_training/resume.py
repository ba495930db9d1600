"""What a run continues from, and whether it may: the checkpoint, its model, and its place in the data."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from data import SFTDataset
from post_training.checkpoint_origin import check_origin, origin
from post_training.checkpoints import (
    checkpoint_path,
    chosen_checkpoint,
    iteration_of,
    latest_checkpoint,
    point_at,
    read_manifest,
    tracked_iteration,
)
from post_training.datasets import Split
from post_training.errors import SetupError
from post_training.hf_config import local_model_folder
from post_training.platform.random_states import layout_of
from post_training.step_flags import check_learning_rate

# What a position in the data, a number of packs, depends on; the data comes last: its packs depend on
# the others.
PLAN_KEYS = ("seq_length", "seed", "packing", "global_batch_size")


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


class DataPosition:
    """The place in the training data, in a form that a checkpoint keeps and a later run compares.

    A position is a number of packs of one packing plan: with another plan the run would go on without a
    word, train some documents twice and others never. `args.data_begins_at` is the number of consumed packs
    (`args.consumed_train_samples`) at which this plan began: 0, or where `--restart-data` put it in place
    of another.
    """

    def __init__(self, args: argparse.Namespace, plan: SFTDataset) -> None:
        """For a run of `plan`; `check()` then tells where in it to go on."""
        self.args = args
        self.plan = plan
        self._facts: dict[str, Any] = {key: getattr(args, key) for key in PLAN_KEYS}
        self._facts |= {"documents": plan.documents.fingerprint, "plan_hash": plan.plan_hash}
        self._base_weights = _weights_digest(args)
        self._origin = origin(args)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run as it is now."""
        consumed = int(self.args.consumed_train_samples)
        epoch, pack = self.plan.locate(consumed - self.args.data_begins_at)
        ended = self.plan.epochs is not None and epoch >= self.plan.epochs
        return {
            "consumed_samples": consumed,
            "layout": layout_of(self.args),
            "base_weights": self._base_weights,
            "origin": self._origin,
            "data": {
                **self._facts,
                "begins_at": self.args.data_begins_at,
                "epoch": epoch,
                "pack": pack,
                "filler": pack if ended else 0,
            },
        }

    def check(self, checkpoint: Path | None) -> None:
        """Find the place in the data that `checkpoint` (None: a fresh start) was saved at.

        Raises:
            SetupError: the checkpoint was made from other base weights or other data, and the run was not
                told to start its data anew.
        """
        args = self.args
        if checkpoint is None or args.finetune:
            return
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise SetupError(
                f"{checkpoint} does not say where in which data it was saved: add --finetune to start "
                f"from its weights"
            )
        own = checkpoint == checkpoint_path(args.save, manifest["iteration"])
        if own and manifest["base_weights"] != self._base_weights:
            raise SetupError(
                f"--output-dir {args.output_dir} holds a run that was started from other weights than "
                f"those of --hf-model: give the same again, or choose another --output-dir"
            )
        before: dict[str, Any] = manifest["data"]
        batch = before["global_batch_size"]
        if batch != args.global_batch_size:
            raise SetupError(
                f"{checkpoint} was saved with --global-batch-size {batch}, this run's is "
                f"{args.global_batch_size}: a step would be another number of packs; give the same, or "
                f"--finetune with --load in another --output-dir to start from its weights"
            )
        consumed = manifest["consumed_samples"]
        differs = [key for key in self._facts if before.get(key) != self._facts[key]]
        if args.restart_data and (differs or not own):
            args.data_begins_at = consumed
            return
        if differs:
            raise SetupError(
                f"{checkpoint} was saved in other data: {self._difference(before, differs)}; give the "
                f"same again to continue, or --restart-data to keep the weights, optimizer and step "
                f"and begin the new data at its beginning"
            )
        args.data_begins_at = before["begins_at"]
        position = self.plan.locate(consumed - args.data_begins_at)
        if position != (before["epoch"], before["pack"]):
            raise SetupError(
                f"{checkpoint} was saved at pack {before['pack']} of epoch {before['epoch']}, which is "
                f"not where {consumed - args.data_begins_at} packs of this data end {position}: its "
                f"manifest.json has been changed"
            )

        if (
            before["filler"]
            and (self.plan.epochs or sys.maxsize) > before["epoch"]
            and args.rank == 0
        ):
            print(
                f"warning: the last batch of {checkpoint} held {before['filler']} empty packs behind the "
                f"last epoch: as many packs of the next epoch are left out",
                file=sys.stderr,
            )

    def _difference(self, before: dict[str, Any], differs: list[str]) -> str:
        for key in PLAN_KEYS:
            if key in differs:
                flag = f"--{key.replace('_', '-')}"
                return f"{flag} was {before.get(key)}, now {self._facts[key]}"
        if "documents" in differs:
            return "the training data differs"
        return "its packs are planned in another way by this version"


def find_position(
    args: argparse.Namespace, train: Split | None, checkpoint: Path | None
) -> DataPosition | None:
    """The place in the training data to go on at, and with `--num-epochs` the steps to its end.

    Sets `args.train_iters` from `--num-epochs`.

    Args:
        args: parsed arguments.
        train: the training data; None when nothing is trained.
        checkpoint: what the run continues from.

    Returns:
        None when nothing is trained.

    Raises:
        SetupError: as `DataPosition.check`; or the learning rate cannot go as its flags say over the steps
            of `--num-epochs`.
    """
    if train is None:
        return None
    plan = train.packs
    position = DataPosition(args, plan)
    position.check(checkpoint)
    if args.num_epochs:
        # Filler packs, which weigh nothing, make the last step full.
        steps = -(-plan.num_packed_samples // args.global_batch_size)
        args.train_iters = args.data_begins_at // args.global_batch_size + steps
        check_learning_rate(args)
    return position


def _weights_digest(args: argparse.Namespace) -> str | None:
    """A digest of samples of the weight files: the same for the same base model, wherever it lies."""
    if args.hf_config is None or args.random_weights:
        return None
    digest = hashlib.sha256()
    for path in sorted(local_model_folder(args.hf_model).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()
