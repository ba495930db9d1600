"""The splits of a run: prepared documents, and the one packing plan over each."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import Documents, DocumentSet, SFTDataset
from data.documents.provenance import source_names, source_of
from data.errors import DataError
from data.features.dataset import OfflineDataset, open_features
from data.features.mixture import MixedFeatures, parts_of
from data.features.reader import Features, require_made_by
from data.images.processor import ImageProcessor
from data.packs.pictures import PictureDataset
from data.prepare.splits import (
    DataSplit,
    image_processor,
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
    args: argparse.Namespace,
    split: DataSplit,
    documents: SplitDocuments | Features,
    tokenizer: Any,
    names: Sequence[str] = (),
) -> Split:
    """Put documents into packs.

    Args:
        args: resolved arguments.
        split: its name.
        documents: of the split, or its stored features.
        tokenizer: the run's.
        names: the features that packs carry.

    Raises:
        DataError: there are none, or one does not fit into a pack.
    """
    made: Any
    if isinstance(documents, SplitDocuments):
        made = packs_of(args, split, documents, tokenizer)
    else:
        made = functools.partial(OfflineDataset, documents, names=names)
    sizes = {"tokenizer": tokenizer, "seq_length": args.seq_length, "packing": args.packing}
    packs: SFTDataset
    if split == "train":
        packs = made(
            None if args.num_epochs else 0,
            **sizes,
            seed=args.seed,
            epochs=args.num_epochs,
            global_batch_size=args.global_batch_size,
        )
    else:
        packs = made(None, **sizes, shuffle=False)
        batch = args.eval_global_batch_size or args.global_batch_size
        packs = packs.shard(num_packed_samples=-(-len(packs) // batch) * batch)
    if isinstance(documents, MixedFeatures) and len(documents.parts) <= MOST_SOURCES:
        folders = [str(part.folder.parent) for part in documents.parts]
        return Split(packs, Sources(folders, documents.part_of))
    if not isinstance(documents, SplitDocuments):
        return Split(packs, Sources([], None))
    return Split(packs, sources_of(args, split, documents))


def packs_of(
    args: argparse.Namespace, split: DataSplit, documents: SplitDocuments, tokenizer: Any
) -> Callable[..., SFTDataset]:
    """The class of a split's packs, with its documents and what decodes their pictures.

    Raises:
        SetupError: the model cannot see pictures.
    """
    if not documents.has_pictures:
        return functools.partial(SFTDataset, hf_dataset=documents)
    processor = _processor(args, split, tokenizer)
    return functools.partial(PictureDataset, processor, hf_dataset=documents)


def _processor(args: argparse.Namespace, split: str, tokenizer: Any) -> ImageProcessor:
    """What decodes the pictures of a split.

    Raises:
        SetupError: the model cannot see them.
    """
    found = image_processor(args, tokenizer)
    if isinstance(found, str) or getattr(args, "model_backend", "transformers") == "megatron":
        why = found if isinstance(found, str) else "Megatron's layers compute the model"
        raise SetupError(f"the {split} data has pictures, and {why}")
    return found


def stored_split(args: argparse.Namespace, split: DataSplit) -> Features | None:
    """The stored features of a split; None where the folder has none of it.

    Raises:
        DataError: there is no such folder, or what is stored is not complete.
    """
    flag = "--offline-distillation-data"
    found = parse_weighted(args.offline_distillation_data)
    for folder in (folders := [Path(path) for path, _ in found]):
        if not folder.is_dir():
            raise DataError(f"{flag} {folder}: there is no such folder")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError(f"{flag}: a folder is named twice, and a mixture repeats no document")
    weights = [weight for _, weight in found if weight is not None]
    if weights and len(weights) < len(found):
        raise DataError(f"{flag}: give every folder a weight (DIR=WEIGHT), or none")
    if weights and split == "train":
        parts = [open_features(folder / split) for folder in folders]
        return MixedFeatures(parts, weights, list(map(str, folders)), args.seed)
    parts = [open_features(folder / split) for folder in folders if (folder / split).is_dir()]
    return MixedFeatures(parts, None, [], args.seed) if len(parts) > 1 else next(iter(parts), None)


def prepare_data(
    args: argparse.Namespace,
    *,
    names: Sequence[str] = (),
    wanted: Callable[[Any], Mapping[str, Any]] = lambda tokenizer: {},
) -> tuple[Any, dict[str, Split]]:
    """Tokenise, mask and plan every split, before any process group exists.

    Args:
        args: resolved arguments.
        names: of `--offline-distillation-data` the features that packs carry.
        wanted: what these must have been made by, given the tokenizer.

    Returns:
        The tokenizer, and the splits by name; one without data is left out.
    """
    tokenizer = load_tokenizer(args)
    splits: dict[str, Split] = {}
    for split in SPLITS:
        if split == "train" and args.skip_train:
            continue
        features = None
        if args.offline_distillation_data is None:
            documents = prepare_documents_from_args(args, split, tokenizer)
        else:
            features = stored_split(args, split)
            documents = features.documents if features is not None else None
        if documents is None:
            continue
        if args.vocab_size is not None and documents.max_token_id >= args.vocab_size:
            raise SetupError(
                f"the {split} data holds token id {documents.max_token_id}, the model's vocabulary has "
                f"{args.vocab_size} entries: "
                + (
                    "--hf-tokenizer and --hf-model do not fit together"
                    if features is None
                    else "what --offline-distillation-data stores is of another tokenizer"
                )
            )
        if features is not None:
            for part in parts_of(features):
                require_made_by(part, wanted(tokenizer))
        splits[split] = plan_split(
            args, split, documents if features is None else features, tokenizer, names
        )
    if args.skip_train and not splits:
        raise SetupError(
            "--eval-only: there is nothing to evaluate on; give --valid-data-files or "
            "--test-data-files (or --split-ratio with the training data)"
        )
    if "train" not in splits and not args.skip_train:
        where = args.offline_distillation_data
        raise SetupError(
            f"--offline-distillation-data {' '.join(where)}: holds no folder train"
            if where
            else "no training data: give --finetune-data-files or --finetune-hf-dataset"
        )
    return tokenizer, splits


def calibration_data(
    args: argparse.Namespace, splits: Mapping[str, Split], tokenizer: Any
) -> SFTDataset:
    """The plan over what a quantised model's inputs are measured on: `--calib-dataset`, or training data.

    Raises:
        DataError: the files are not there, or hold no documents.
    """
    if args.calib_dataset is None:
        return splits["train"].packs
    alone = argparse.Namespace(**vars(args))
    alone.finetune_data_files, alone.finetune_hf_dataset = args.calib_dataset, None
    alone.valid_data_files = alone.test_data_files = alone.split_ratio = None
    try:
        documents = prepare_documents_from_args(alone, "train", tokenizer)
    except DataError as error:
        raise DataError(str(error).replace("--finetune-data-files", "--calib-dataset")) from error
    if documents is None:
        raise SetupError("--calib-dataset: there are no documents")
    return plan_split(alone, "valid", documents, tokenizer).packs


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
    """Global batches of each split to evaluate: the whole split, or `--eval-iters` of it (0: none).

    Raises:
        SetupError: `--eval-at-start` would evaluate none.
    """
    batches: dict[str, int] = {}
    for split in ("valid", "test"):
        if split in splits and args.eval_iters != 0:
            whole = len(splits[split].packs) // (
                args.eval_global_batch_size or args.global_batch_size
            )
            batches[split] = min(whole, args.eval_iters or whole)
    if args.eval_at_start and "valid" not in batches:
        raise SetupError("--eval-at-start: there is no validation data; give some, or leave it out")
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
