"""The place of a run in its training data, and whether a later run may go on there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DocumentSet, SFTDataset
from data.documents.earlier_caches import cache_has_documents
from data.features.manifest import differences
from data.prepare.prepare import DAY
from data.prepare.splits import cache_dir
from post_training.arguments.schedule import check_learning_rate
from post_training.batch.splits import Split
from post_training.checkpoint.origin import origin
from post_training.checkpoint.store import MANIFEST, Checkpoint
from post_training.errors import SetupError
from post_training.hf.folder import local_model_folder, weights_digest
from post_training.platform.checkpoints.random_states import layout_of

# What a position in the data, a number of packs, depends on besides the documents, which come last: their
# packs depend on these.
PLAN_KEYS = ("seq_length", "seed", "packing", "global_batch_size")
# Without these a manifest does not say where in which data it was saved.
_PLACE = {"base_weights", "consumed_samples", "data"}
_PLACE_IN_DATA = {"global_batch_size", "begins_at", "epoch", "pack", "filler"}
# Of what documents are made of, what is no hash.
_SHOWN = ("path", "libraries", DAY)


class PlannedData:
    """The training data in a form that a checkpoint keeps and a later run compares.

    A position is a number of packs of one packing plan: with another plan the run would go on without a
    word, train some documents twice and others never.
    """

    def __init__(
        self, args: argparse.Namespace, plan: SFTDataset, teaching: Mapping[str, Any] | None = None
    ) -> None:
        """For a run of `plan`, taught by `teaching`; `begins_at()` then tells where in it to go on."""
        self.args = args
        self._teaching: dict[str, Any] = json.loads(json.dumps(dict(teaching or {})))
        self.plan = plan
        self._facts: dict[str, Any] = {key: getattr(args, key) for key in PLAN_KEYS}
        self._facts |= {"contents": plan.documents.contents, "plan_hash": plan.plan_hash}
        documents = plan.documents
        parts = documents.parts if isinstance(documents, DocumentSet) else [documents]
        self._made_of = [part.report.get("made_of", {}) for part in parts]
        self._base_weights = _weights_digest(args)
        self._origin = origin(args)

    def facts(self, begins_at: int) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run as it is now; its data began at `begins_at`."""
        consumed = int(self.args.consumed_train_samples)
        epoch, pack = self.plan.locate(consumed - begins_at)
        ended = self.plan.epochs is not None and epoch >= self.plan.epochs
        return {
            "consumed_samples": consumed,
            "layout": layout_of(self.args),
            "base_weights": self._base_weights,
            "origin": self._origin,
            "teaching": self._teaching,
            "data": {
                **self._facts,
                "made_of": self._made_of,
                "begins_at": begins_at,
                "epoch": epoch,
                "pack": pack,
                "filler": pack if ended else 0,
            },
        }

    def begins_at(self, checkpoint: Checkpoint | None) -> int:
        """The consumed packs at which this plan begins, in a run that goes on from `checkpoint`.

        Returns:
            0, also of a fresh start (None), or where `--restart-data` put the plan in place of another.

        Raises:
            SetupError: the checkpoint was made from other base weights or other data, and the run was not
                told to start its data anew.
        """
        args = self.args
        if checkpoint is None:
            return 0
        path, manifest = checkpoint.path, checkpoint.manifest
        assert manifest is not None  # else `choose_checkpoint` has refused it
        if not (manifest.keys() >= _PLACE and manifest["data"].keys() >= _PLACE_IN_DATA):
            raise SetupError(
                f"{path}: its {MANIFEST} does not say where in which data it was saved: start from its "
                f"weights with --load and --finetune in another --output-dir"
            )
        own = path.parent == Path(args.save)
        if own and (kept := manifest["base_weights"]) != _weights_digest(args, like=kept):
            raise SetupError(
                f"--output-dir {args.output_dir} holds a run that was started from other weights than "
                f"those of --hf-model: give the same again, or choose another --output-dir"
            )
        self._compare_teaching(checkpoint)
        before = self._comparable(manifest["data"])
        batch = before["global_batch_size"]
        if batch != args.global_batch_size:
            raise SetupError(
                f"{path} was saved with --global-batch-size {batch}, this run's is "
                f"{args.global_batch_size}: a step would be another number of packs; give the same, or "
                f"--finetune with --load in another --output-dir to start from its weights"
            )
        consumed = manifest["consumed_samples"]
        differs = [key for key in self._facts if before.get(key) != self._facts[key]]
        if args.restart_data and (differs or not own):
            return int(consumed)
        if differs:
            raise SetupError(
                f"{path} {self._difference(before, differs)}; give the same again to continue, or "
                f"--restart-data to keep the weights, optimizer and step and begin the new data at its "
                f"beginning"
            )
        changed = self._changed(before)
        if changed and args.rank == 0:
            print(
                f"note: the documents are those that {path} was saved with, though this differs: "
                f"{', '.join(changed)}",
                file=sys.stderr,
            )
        begins_at: int = before["begins_at"]
        position = self.plan.locate(consumed - begins_at)
        if position != (before["epoch"], before["pack"]):
            raise SetupError(
                f"{path} was saved at pack {before['pack']} of epoch {before['epoch']}, which is "
                f"not where {consumed - begins_at} packs of this data end {position}: its "
                f"manifest.json has been changed"
            )

        if (
            before["filler"]
            and (self.plan.epochs or sys.maxsize) > before["epoch"]
            and args.rank == 0
        ):
            print(
                f"warning: the last batch of {path} held {before['filler']} empty packs behind the "
                f"last epoch: as many packs of the next epoch are left out",
                file=sys.stderr,
            )
        return begins_at

    def _compare_teaching(self, checkpoint: Checkpoint) -> None:
        """Refuse another teacher; stored features are data, of which a run may be given others."""
        before = (checkpoint.manifest or {}).get("teaching")
        if before is None:  # of a version before
            return
        free = {"features"} if self.args.restart_data else set()
        then, now = (
            {k: v for k, v in d.items() if k not in free} for d in (before, self._teaching)
        )
        if other := differences(then, now):
            raise SetupError(
                f"{checkpoint.path} was taught otherwise: {other}; give the same again, or start from its "
                f"weights with --load and --finetune in another --output-dir"
            )

    def _comparable(self, before: dict[str, Any]) -> dict[str, Any]:
        """What a manifest says of the data; a version before named a token cache in place of contents."""
        if "contents" in before:
            return before
        plan, name = self.plan, before["documents"]
        same = cache_has_documents(cache_dir(self.args), name, plan.documents)
        if same is None:
            return before
        if not same:
            return {**before, "contents": "other"}
        planned = before["plan_hash"] == plan.plan_hash_of(name)
        plan_hash = plan.plan_hash if planned else before["plan_hash"]
        return {**before, "contents": plan.documents.contents, "plan_hash": plan_hash}

    def _changed(self, before: dict[str, Any]) -> list[str]:
        """What the documents are made of that was something else before."""
        if "made_of" not in before:
            return [
                f"the version of this project (compared with token cache {before['documents']})"
            ]
        changed: dict[str, list[str]] = {}
        for then, now in zip(before["made_of"], self._made_of, strict=False):
            for key, value in now.items():
                if then.get(key) != value:
                    changed.setdefault(key, []).append(f"{then.get(key)}, now {value}")
        return [
            f"{key} ({'; '.join(dict.fromkeys(values))})" if key in _SHOWN else key
            for key, values in changed.items()
        ]

    def _difference(self, before: dict[str, Any], differs: list[str]) -> str:
        other = "was saved in other data:"
        for key in PLAN_KEYS:
            if key in differs:
                flag = f"--{key.replace('_', '-')}"
                return f"{other} {flag} was {before.get(key)}, now {self._facts[key]}"
        if "contents" not in before:
            return (
                f"cannot be compared with this data: it is of a version before, and the token cache "
                f"{before['documents']} that it was saved with is not in {cache_dir(self.args)} "
                f"(--data-cache-dir)"
            )
        if "contents" in differs:
            return f"{other} the training data differs"
        return f"{other} its packs are planned in another way by this version"


@dataclass(frozen=True)
class DataPosition:
    """The place in the training data at which a run goes on."""

    data: PlannedData
    begins_at: int
    """Consumed packs (`args.consumed_train_samples`) at which the data began."""
    train_iters: int
    """Steps to the end of the run, those of the checkpoint before among them."""

    def flags(self) -> dict[str, Any]:
        """As `complete_run` takes it."""
        return {"begins_at": self.begins_at, "train_iters": self.train_iters}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run as it is now."""
        return self.data.facts(self.begins_at)


def find_position(
    args: argparse.Namespace,
    train: Split | None,
    checkpoint: Checkpoint | None,
    teaching: Mapping[str, Any] | None = None,
) -> DataPosition | None:
    """The place in the training data to go on at, and the steps to its end, with `--num-epochs` too.

    Args:
        args: parsed arguments.
        train: the training data; None when nothing is trained.
        checkpoint: what the run continues from; None where it takes at most weights.
        teaching: what the run learns of beside its documents, in the types of JSON.

    Returns:
        None when nothing is trained.

    Raises:
        SetupError: as `PlannedData.begins_at`; or the learning rate cannot go as its flags say over the
            steps of `--num-epochs`.
    """
    if train is None:
        return None
    plan = train.packs
    data = PlannedData(args, plan, teaching)
    begins_at = data.begins_at(checkpoint)
    if not args.num_epochs:
        return DataPosition(data, begins_at, args.train_iters)
    # Filler packs, which weigh nothing, make the last step full.
    steps = -(-plan.num_packed_samples // args.global_batch_size)
    train_iters = begins_at // args.global_batch_size + steps
    check_learning_rate(argparse.Namespace(**(vars(args) | {"train_iters": train_iters})))
    return DataPosition(data, begins_at, train_iters)


def _weights_digest(args: argparse.Namespace, like: str | None = None) -> str | None:
    """The digest of the base model's weights, where the run begins with any; `like` as it was kept."""
    if args.hf_config is None or args.random_weights:
        return None
    return weights_digest(local_model_folder(args.hf_model), like=like)
