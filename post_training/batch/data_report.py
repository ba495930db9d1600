"""What a run uses of its data: counts of each split and source, and what became of their rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from data import Documents, DocumentSet
from data.documents.cache_build import BAD_ROWS
from data.documents.mixture import shared_documents
from data.documents.provenance import document_place
from data.prepare.splits import cache_dir
from post_training.batch.splits import SPLITS, Split, SplitDocuments
from post_training.hf.config_json import with_limit


def describe(splits: Mapping[str, Split], args: argparse.Namespace) -> str:
    """A line for each split and one for each source of it.

    Nothing is lost without being counted: rows read, kept and dropped by reason, and where the dropped
    ones are listed.
    """
    lines = []
    for split in SPLITS:
        if split not in splits:
            continue
        plan, used = splits[split].packs, splits[split].documents
        packs = plan.packs_per_epoch(0)
        batch = args.global_batch_size
        lines.append(
            f"{split}: {len(used):,} documents, {int(used.lengths.sum()):,} tokens; {packs:,} packs of "
            f"{args.seq_length}, {plan.fill:.1%} full"
            + (f" = {packs / batch:,.1f} steps" if batch else "")
        )
        parts = used.parts if isinstance(used, DocumentSet) else [used]
        lines += [
            f"{split}: {_describe_part(part, _use_of(used, number), args)}"
            for number, part in enumerate(parts)
        ]
        lines += [f"{split}: {warning}" for warning in used.report.get("warnings") or ()]
        if split != "train" and "train" in splits:
            lines += _describe_overlap(split, used, splits["train"].documents)
    others = getattr(args, "model_backend", None) == "transformers"
    config = None if others else getattr(args, "hf_config", None)
    if (
        config is not None
        and "train" in splits
        and args.seq_length > config.max_position_embeddings
    ):
        limit = with_limit(config, args.seq_length).max_position_embeddings
        lines.append(
            f"warning: --seq-length {args.seq_length}: the model was made for "
            f"{config.max_position_embeddings} tokens (max_position_embeddings of config.json); longer "
            f"documents are trained all the same, and the exported config.json says {limit}"
            + ("" if limit == args.seq_length else ", by which its frequencies are scaled")
        )
    return "\n".join(lines)


def _describe_overlap(split: str, used: SplitDocuments, train: SplitDocuments) -> list[str]:
    """A warning of documents that are in the training data as well."""
    shared, like = shared_documents(used, train)
    if not len(shared):
        return []
    first, other = document_place(used, int(shared[0])), document_place(train, int(like[0]))
    return [
        f"{split}: warning: {len(shared):,} of {len(used):,} documents are in the training data too, "
        f"the first at {first} (and {other}); the loss on them is not that on unseen data"
    ]


def _describe_part(part: Documents, use: str, args: argparse.Namespace) -> str:
    """What became of the rows of one source."""
    report = part.report
    names = report.get("sources") or ["rows"]
    name = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    dropped = {k: v for k, v in (report.get("dropped") or {}).items() if v}
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    listed = cache_dir(args) / part.fingerprint / BAD_ROWS
    form = report.get("format")  # of documents that came with their masks there is none
    made = f"format {form}, masks by {report.get('mask_method')}; " if form else ""
    trained = report.get("trained_tokens", 0) / max(1, report.get("tokens", 0))
    return (
        f"{name}: {made}"
        + (f"dated {day} by the template; " if (day := report.get("template_date")) else "")
        + f"{report.get('read', 0):,} rows read, {report.get('kept', 0):,} kept"
        + (f", dropped: {reasons} (listed in {listed})" if reasons else "")
        + (f", {report['trimmed']:,} trimmed" if report.get("trimmed") else "")
        + f"; {report.get('tokens', 0):,} tokens, {trained:.0%} trained{use}"
    )


def _use_of(used: SplitDocuments, number: int) -> str:
    """How much of source `number` is used, where that is not all of it."""
    if not isinstance(used, DocumentSet):
        return ""
    chosen = used.part_of == number
    count = f"; {int(chosen.sum()):,} documents used"
    mixture = list(used.report.get("mixture", {}).values())
    if len(mixture) != len(used.parts):
        return count
    wanted, achieved = mixture[number]["weight"], mixture[number]["achieved"]
    return f"{count}, {achieved:.2%} of the tokens ({wanted:.2%} wanted)"
