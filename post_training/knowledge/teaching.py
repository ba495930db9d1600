"""What a run learns of beside its documents, as its checkpoints keep it and a resume compares it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data.features.dataset import OfflineDataset
from post_training.batch.splits import Split
from post_training.distillation.features import stored_names
from post_training.hf.folder import local_model_folder, weights_digest
from post_training.knowledge.settings import KnowledgeSettings
from post_training.knowledge.teacher import Teacher


def teaching(
    args: argparse.Namespace,
    splits: Mapping[str, Split],
    settings: KnowledgeSettings | None,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """By name, in the types of JSON; empty for a run that learns of its documents only.

    Args:
        args: resolved arguments.
        splits: those of the run.
        settings: of knowledge distillation.
        teacher: that is at hand.
    """
    found: dict[str, Any] = {}
    if args.draft is not None:
        found["draft_ttt_steps"] = args.draft_ttt_steps
        found["draft_loss_decay"] = args.draft_loss_decay
        found["draft_detach_steps"] = args.draft_detach_steps
    if settings is not None:
        found |= asdict(settings)
    if teacher is not None:
        found["teacher"] = _digest(teacher)
    packs = splits["train"].packs if "train" in splits else None
    if isinstance(packs, OfflineDataset) and stored_names(args):
        features = packs.features
        kept = {name: str(field) for name, field in features.fields.items()}
        found["features"] = {**(features.made_by or {}), "fields": kept}
    return found


def _digest(teacher: Teacher) -> str:
    """The same for the same weights, wherever they lie, and as versions before have kept it."""
    if teacher.checkpoint is None:
        return weights_digest(local_model_folder(teacher.args.hf_model), like="")
    return weights_digest(teacher.checkpoint.path, "**/*", like="")
