"""The splits of a run: prepared documents, and the packing plan over them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data import Documents, DocumentSet, SFTDataset
from data.cache_build import BAD_ROWS
from data.document_set import shared_documents
from data.provenance import document_place, source_names, source_of
from data.splits import (
    DataSplit,
    cache_dir,
    parse_weighted,
    prepare_documents_from_args,
    training_sources,
)
from post_training.errors import SetupError
from post_training.tokenizer import load_tokenizer

# One source of rows, or several mixed.
SplitDocuments = Documents | DocumentSet

SPLITS: tuple[DataSplit, ...] = ("train", "valid", "test")

# A loss mask, of one byte a token, holds 1 + the number of the source.
MOST_SOURCES = 254


@dataclass(frozen=True)
class Sources:
    """The sources of one split whose losses are reported apart, if there are several."""

    names: list[str]
    """Empty where there is one source, or more than a loss mask can tell apart."""
    of: Callable[[int], int] | None
    """From the index of a document to the number of its source."""


def sources_of(args: argparse.Namespace, split: str, documents: SplitDocuments) -> Sources:
    """The sources of a split: one for each file, folder, glob or dataset that was given."""
    from_train = split == "train" or args.split_ratio is not None
    entries = (
        training_sources(args)
        if from_train
        else [path for path, _ in parse_weighted(getattr(args, f"{split}_data_files") or ())]
    )
    of = source_of(documents, entries)
    if of is None or len(entries) > MOST_SOURCES:
        return Sources([], None)
    return Sources(source_names(entries), of)


def prepare_data(args: argparse.Namespace) -> tuple[Any, dict[str, SplitDocuments]]:
    """Tokenise and mask every split, before any process group exists.

    Returns:
        The tokenizer, and documents by split; a split without data is left out.
    """
    tokenizer = load_tokenizer(args)
    documents: dict[str, SplitDocuments] = {}
    for split in SPLITS:
        if split == "train" and args.skip_train:
            continue
        prepared = prepare_documents_from_args(args, split, tokenizer)
        if prepared is None:
            continue
        if args.vocab_size is not None and prepared.max_token_id >= args.vocab_size:
            raise SetupError(
                f"the {split} data holds token id {prepared.max_token_id}, the model's vocabulary has "
                f"{args.vocab_size} entries: --hf-tokenizer and --hf-model do not fit together"
            )
        documents[split] = prepared
    if args.skip_train and not documents:
        raise SetupError(
            "--eval-only: there is nothing to evaluate on; give --valid-data-files or "
            "--test-data-files (or --split-ratio with the training data)"
        )
    if "train" not in documents and not args.skip_train:
        raise SetupError("no training data: give --finetune-data-files or --finetune-hf-dataset")
    return tokenizer, documents


def packs_of(
    documents: SplitDocuments, tokenizer: Any, args: argparse.Namespace, split: str, **options: Any
) -> SFTDataset:
    """The packing plan of a split, sharded by `num_shards` and `shard_index` in `options`."""
    if split == "train":
        return SFTDataset(
            options.pop("num_packed_samples", None),
            documents,
            tokenizer,
            args.seq_length,
            seed=args.seed,
            packing=args.packing,
            **options,
        )
    batch = args.eval_global_batch_size or args.global_batch_size
    whole = SFTDataset(
        None, documents, tokenizer, args.seq_length, packing=args.packing, shuffle=False
    )
    # Filler packs make the last batch full; they weigh nothing.
    samples = -(-whole.num_packed_samples // batch) * batch
    return SFTDataset(
        samples,
        documents,
        tokenizer,
        args.seq_length,
        packing=args.packing,
        shuffle=False,
        epochs=1,
        **options,
    )


def evaluation_batches(
    args: argparse.Namespace, tokenizer: Any, documents: dict[str, SplitDocuments]
) -> dict[str, int]:
    """Global batches of each split to evaluate: the whole split, or `--eval-iters` of it (0: none)."""
    batches: dict[str, int] = {}
    for split in ("valid", "test"):
        if split in documents and args.eval_iters != 0:
            packs = len(packs_of(documents[split], tokenizer, args, split))
            whole = packs // args.eval_global_batch_size
            batches[split] = min(whole, args.eval_iters or whole)
    return batches


def first_prompts(documents: dict[str, SplitDocuments], count: int) -> list[list[int]]:
    """Token ids of the first conversations of the validation split up to where the assistant answers."""
    if "valid" not in documents:
        return []
    split = documents["valid"]
    prompts = []
    for index in range(min(count, len(split))):
        ids, mask = split[index]
        prompts.append([int(token) for token in ids[: int(mask.argmax())]])
    return [prompt for prompt in prompts if prompt]


def check_same_documents(documents: dict[str, SplitDocuments], device: torch.device | str) -> None:
    """Compare the documents' contents over all ranks, once they can talk to each other.

    Raises:
        SetupError: on every rank, when machines have prepared different documents.
    """
    text = "".join(documents[split].contents for split in SPLITS if split in documents)
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    highest, lowest = bounds[0].item(), -bounds[1].item()
    if highest != lowest:
        raise SetupError(
            "the ranks have prepared different data: give all machines the same files, or share "
            "--data-cache-dir"
        )


def describe(documents: dict[str, SplitDocuments], tokenizer: Any, args: argparse.Namespace) -> str:
    """What a run uses of its data, a line for each split and one for each source of it.

    Nothing is lost without being counted: rows read, kept and dropped by reason, and where the dropped
    ones are listed.
    """
    lines = []
    for split in SPLITS:
        if split not in documents:
            continue
        used = documents[split]
        plan = packs_of(used, tokenizer, args, split, **({} if split != "train" else {"epochs": 1}))
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
        if split != "train" and "train" in documents:
            lines += _describe_overlap(split, used, documents["train"])
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
    trained = report.get("trained_tokens", 0) / max(1, report.get("tokens", 0))
    return (
        f"{name}: format {report.get('format')}, masks by {report.get('mask_method')}; "
        f"{report.get('read', 0):,} rows read, {report.get('kept', 0):,} kept"
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
