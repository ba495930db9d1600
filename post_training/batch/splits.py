"""The splits of a run: prepared documents, and the one packing plan over each."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from data import Documents, DocumentSet, SFTDataset
from data.documents.provenance import source_names, source_of
from data.prepare.splits import (
    DataSplit,
    parse_weighted,
    prepare_documents_from_args,
    training_sources,
)
from post_training.errors import SetupError
from post_training.hf.tokenizer import load_tokenizer

# One source of rows, or several mixed.
SplitDocuments = Documents | DocumentSet

SPLITS: tuple[DataSplit, ...] = ("train", "valid", "test")

# More of them, such as all that a shell's glob found, would fill every step's record.
MOST_SOURCES = 256


@dataclass(frozen=True)
class Sources:
    """The sources of one split whose losses are reported apart, if there are several."""

    names: list[str]
    """Empty where there is one source, or more than `MOST_SOURCES`."""
    of: Callable[[int], int] | None
    """From the index of a document to the number of its source."""


@dataclass(frozen=True)
class Split:
    """One split, planned once: all that reads it takes shards of `packs`."""

    packs: SFTDataset
    """Its plan over all shards. Training takes as many packs of the endless plan as it has steps for, so
    here are those of `--num-epochs`, or none; of the others all, with filler packs, which weigh nothing,
    to make the last batch full."""
    sources: Sources

    @property
    def documents(self) -> SplitDocuments:
        """Its prepared documents."""
        return self.packs.documents


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


def plan_split(
    args: argparse.Namespace, split: DataSplit, documents: SplitDocuments, tokenizer: Any
) -> Split:
    """Put documents into packs.

    Raises:
        DataError: there are none, or one does not fit into a pack.
    """
    if split == "train":
        packs = SFTDataset(
            None if args.num_epochs else 0,
            documents,
            tokenizer,
            args.seq_length,
            seed=args.seed,
            packing=args.packing,
            epochs=args.num_epochs,
            global_batch_size=args.global_batch_size,
        )
    else:
        packs = SFTDataset(
            None, documents, tokenizer, args.seq_length, packing=args.packing, shuffle=False
        )
        batch = args.eval_global_batch_size or args.global_batch_size
        packs = packs.shard(num_packed_samples=-(-len(packs) // batch) * batch)
    return Split(packs, sources_of(args, split, documents))


def prepare_data(args: argparse.Namespace) -> tuple[Any, dict[str, Split]]:
    """Tokenise, mask and plan every split, before any process group exists.

    Returns:
        The tokenizer, and the splits by name; one without data is left out.
    """
    tokenizer = load_tokenizer(args)
    splits: dict[str, Split] = {}
    for split in SPLITS:
        if split == "train" and args.skip_train:
            continue
        documents = prepare_documents_from_args(args, split, tokenizer)
        if documents is None:
            continue
        if args.vocab_size is not None and documents.max_token_id >= args.vocab_size:
            raise SetupError(
                f"the {split} data holds token id {documents.max_token_id}, the model's vocabulary has "
                f"{args.vocab_size} entries: --hf-tokenizer and --hf-model do not fit together"
            )
        splits[split] = plan_split(args, split, documents, tokenizer)
    if args.skip_train and not splits:
        raise SetupError(
            "--eval-only: there is nothing to evaluate on; give --valid-data-files or "
            "--test-data-files (or --split-ratio with the training data)"
        )
    if "train" not in splits and not args.skip_train:
        raise SetupError("no training data: give --finetune-data-files or --finetune-hf-dataset")
    return tokenizer, splits


def template_date(splits: Mapping[str, Split]) -> str | None:
    """The day that the clock of the chat template said; None for a template without one."""
    for split in splits.values():
        documents = split.documents
        parts = documents.parts if isinstance(documents, DocumentSet) else [documents]
        for part in parts:
            if day := part.report.get("template_date"):
                return str(day)
    return None


def evaluation_batches(args: argparse.Namespace, splits: Mapping[str, Split]) -> dict[str, int]:
    """Global batches of each split to evaluate: the whole split, or `--eval-iters` of it (0: none)."""
    batches: dict[str, int] = {}
    for split in ("valid", "test"):
        if split in splits and args.eval_iters != 0:
            whole = len(splits[split].packs) // (
                args.eval_global_batch_size or args.global_batch_size
            )
            batches[split] = min(whole, args.eval_iters or whole)
    return batches


def first_prompts(splits: Mapping[str, Split], count: int) -> list[list[int]]:
    """Token ids of the first conversations of the validation split up to where the assistant answers."""
    if "valid" not in splits:
        return []
    documents = splits["valid"].documents
    prompts = []
    for index in range(min(count, len(documents))):
        ids, mask = documents[index]
        prompts.append([int(token) for token in ids[: int(mask.argmax())]])
    return [prompt for prompt in prompts if prompt]


def check_same_documents(splits: Mapping[str, Split], device: torch.device | str) -> None:
    """Compare the documents' contents over all ranks, once they can talk to each other.

    Raises:
        SetupError: on every rank, when machines have prepared different documents.
    """
    text = "".join(splits[split].documents.contents for split in SPLITS if split in splits)
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX)
    highest, lowest = bounds[0].item(), -bounds[1].item()
    if highest != lowest:
        raise SetupError(
            "the ranks have prepared different data: give all machines the same files, or share "
            "--data-cache-dir"
        )
