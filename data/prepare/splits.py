"""The documents of each split of a run, as the flags say: from files, datasets, mixtures and ratios."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from data.documents.documents import Documents
from data.documents.mixture import DocumentSet, mix_documents, split_documents
from data.errors import DataError
from data.images.processor import ImageProcessor, open_processor
from data.prepare.prepare import prepare_documents
from data.rows.conversation import reserved_in
from data.rows.converters import FormatOptions
from data.sources.digest import file_digests
from data.sources.files import resolve_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataSplit = Literal["train", "valid", "test"]
_SPLITS: tuple[DataSplit, ...] = ("train", "valid", "test")


def prepare_documents_from_args(
    args: argparse.Namespace, split: DataSplit, tokenizer: PreTrainedTokenizerBase
) -> Documents | DocumentSet | None:
    """Prepare the documents of one split as the flags say.

    Args:
        args: Parsed flags, with ``seq_length`` beside those of ``add_data_arguments``.
        split: ``train``, ``valid`` or ``test``.
        tokenizer: The HuggingFace tokenizer.

    Returns:
        The documents; None for a validation or test split that was not asked for.

    Raises:
        DataError: the flags or the data have to be put right.
    """
    _check_splits(args)
    if split == "train" or args.split_ratio is not None:
        files = args.finetune_data_files or ()
        if not files and not args.finetune_hf_dataset:
            raise DataError(
                "there is no training data: give --finetune-data-files or --finetune-hf-dataset."
            )
        documents = _prepare(args, files, args.finetune_hf_dataset, tokenizer, "train")
        if args.split_ratio is None:
            return documents
        if not isinstance(documents, Documents):
            raise DataError("--split-ratio cannot cut a weighted mixture; give separate files.")
        ratios = _ratios(args.split_ratio)
        parts = split_documents(documents, ratios)
        for name, ratio, part in zip(_SPLITS, ratios, parts, strict=True):
            if (ratio or name == "train") and not len(part):
                raise DataError(
                    f"--split-ratio {args.split_ratio}: no row of {len(documents)} fell into the "
                    f"{name} split. Give it a larger share, or files of its own."
                )
        index = _SPLITS.index(split)
        return parts[index] if ratios[index] or split == "train" else None
    files = getattr(args, f"{split}_data_files") or ()
    return _prepare(args, files, None, tokenizer, split) if files else None


def _files_flag(split: DataSplit) -> str:
    return "--finetune-data-files" if split == "train" else f"--{split}-data-files"


def parse_weighted(entries: Sequence[str]) -> list[tuple[str, float | None]]:
    """Split ``PATH=WEIGHT`` entries; a path that exists as written is never split.

    Raises:
        DataError: a weight is not positive.
    """
    parsed: list[tuple[str, float | None]] = []
    for entry in entries:
        path, equals, word = entry.rpartition("=")
        weight = None
        if equals and not Path(entry).exists():
            with suppress(ValueError):  # an equals sign in a name, not a weight
                weight = float(word)
        if weight is None:
            parsed.append((entry, None))
        elif 0 < weight < math.inf:
            parsed.append((path, weight))
        else:
            raise DataError(f"{entry}: a weight must be a number greater than 0 (PATH=WEIGHT).")
    return parsed


def training_sources(args: argparse.Namespace) -> list[str]:
    """What training data was given, without weights: files, folders and globs, then the dataset."""
    hub = [args.finetune_hf_dataset] if args.finetune_hf_dataset else []
    return [name for name, _ in parse_weighted([*(args.finetune_data_files or ()), *hub])]


def _prepare(
    args: argparse.Namespace,
    files: Sequence[str],
    hf_dataset: str | None,
    tokenizer: PreTrainedTokenizerBase,
    split: DataSplit,
) -> Documents | DocumentSet:
    flag = _files_flag(split)
    parsed = parse_weighted(files)
    hub = parse_weighted([hf_dataset] if hf_dataset else [])
    sources = [*parsed, *hub]
    weighted = [weight for _, weight in sources if weight is not None]
    if not weighted:
        return _prepare_one(args, files, hf_dataset, tokenizer, flag)
    if len(weighted) != len(sources):
        plain = next(number for number, (_, weight) in enumerate(sources) if weight is None)
        raise DataError(
            f"{flag if plain < len(parsed) else '--finetune-hf-dataset'} {sources[plain][0]}: give "
            "every source a weight (PATH=WEIGHT), or none."
        )
    _require_distinct([path for path, _ in parsed], flag)
    parts = [_prepare_one(args, [path], None, tokenizer, flag) for path, _ in parsed]
    parts += [_prepare_one(args, (), name, tokenizer, flag) for name, _ in hub]
    return mix_documents(parts, weighted, [name for name, _ in sources], _seed(args))


def _require_distinct(sources: Sequence[str], flag: str) -> None:
    """Refuse a file that is in two sources of a mixture: its rows would be repeated."""
    seen: dict[Path, int] = {}
    for number, source in enumerate(sources):
        for path in resolve_files([source], flag):
            other = seen.setdefault(path.resolve(), number)
            if other != number:
                raise DataError(
                    f"{flag} {source}: {path} is in {sources[other]} as well, and a mixture repeats "
                    "no row. Give each file to one source."
                )


def _prepare_one(
    args: argparse.Namespace,
    files: Sequence[str],
    hf_dataset: str | None,
    tokenizer: PreTrainedTokenizerBase,
    flag: str,
) -> Documents:
    return prepare_documents(
        files=files,
        hf_dataset=hf_dataset,
        split=args.finetune_data_split,
        tokenizer=tokenizer,
        seq_length=args.seq_length,
        cache_dir=cache_dir(args),
        files_flag=flag,
        **option_fields(args, tokenizer),
    )


def option_fields(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The flags as fields of ``PrepareOptions``, with the image layout of the tokenizer's folder."""
    processor = image_processor(args, tokenizer)
    # Read by who counts answers, which only a run does.
    kind = args.kind_key or ("kind" if getattr(args, "answer_tokens", None) is not None else None)
    return {
        "on_bad_row": args.on_bad_row,
        "overlong": args.overlong,
        "chat_template": args.chat_template,
        "conversation_format": args.conversation_format,
        "format_options": FormatOptions(
            args.system_key,
            args.prompt_key,
            args.query_key,
            args.response_key,
            args.messages_key,
            (*(args.ignore_columns or ()), *([kind] if kind else [])),
            args.strict_columns,
            args.choice_key,
            args.answer_key,
            tuple(args.image_keys) if args.image_keys else None,
            args.answer_form,
        ),
        "reasoning": args.reasoning,
        "loss_on": args.loss_on,
        "separator": args.separator,
        "workers": args.data_workers,
        "max_rows": args.max_rows,
        "template_variables": parse_variables(args.chat_template_variables),
        "template_date": args.template_date,
        "trust_blocks": args.trust_generation_blocks,
        "max_prompt_length": args.max_prompt_length,
        "images": processor if isinstance(processor, str) else processor.layout,
        "image_cache": str(image_cache(args)),
    }


def image_processor(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> ImageProcessor | str:
    """The image processor beside the tokenizer; where there is none of use, why.

    Raises:
        DataError: a flag is for pictures, and there is none.
    """
    found = open_processor(tokenizer, image_cache(args), args.min_pixels, args.max_pixels)
    for flag in ("min_pixels", "max_pixels", "image_keys", "image_cache"):
        if isinstance(found, str) and (value := getattr(args, flag)) is not None:
            raise DataError(f"--{flag.replace('_', '-')} {value}: {found}. Leave it out.")
    return found


def image_cache(args: argparse.Namespace) -> Path:
    """The folder of pictures that rows embed."""
    return Path(args.image_cache or cache_dir(args) / "pictures").expanduser()


def cache_dir(args: argparse.Namespace) -> Path:
    """The folder of token caches: ``--data-cache-dir``, or one for all runs of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(args.data_cache_dir or Path(base) / "sft-data").expanduser()


def _check_splits(args: argparse.Namespace) -> None:
    """Refuse splits and files that overlap, or that are given twice."""
    if args.finetune_data_split != "train" and not args.finetune_hf_dataset:
        raise DataError(
            f"--finetune-data-split {args.finetune_data_split}: only --finetune-hf-dataset has "
            "splits. Leave it out."
        )
    if args.split_ratio is not None and (args.valid_data_files or args.test_data_files):
        raise DataError("give either --split-ratio or --valid-data-files and --test-data-files.")
    flags: dict[Path, str] = {}
    for split in _SPLITS:
        flag, name = _files_flag(split), _files_flag(split)[2:].replace("-", "_")
        files = [path for path, _ in parse_weighted(getattr(args, name) or ())]
        for path in resolve_files(files, flag):
            other = flags.setdefault(path.resolve(), flag)
            if other != flag:
                raise DataError(
                    f"{flag} {path}: this file is also in {other}. Splits must not overlap; "
                    "give other files, or cut one file with --split-ratio."
                )
    # Only files of one size can be copies of each other.
    sizes: dict[int, list[Path]] = {}
    for path in flags:
        sizes.setdefault(path.stat().st_size, []).append(path)
    alike = [path for same in sizes.values() if len(same) > 1 for path in same]
    seen: dict[str, Path] = {}
    for path, digest in zip(alike, file_digests(alike, cache_dir(args)), strict=True):
        first = seen.setdefault(digest, path)
        if flags[first] != flags[path]:
            raise DataError(
                f"{flags[path]} {path}: a copy of {first}, which is in {flags[first]}. Splits must "
                "not overlap; give other files, or cut one file with --split-ratio."
            )
        if first != path:
            raise DataError(
                f"{flags[path]} {path}: a copy of {first}, whose rows would be trained twice. Leave "
                "one of them out."
            )


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if len(ratios) not in (2, 3):
        raise DataError(
            f"--split-ratio {text}: expected two or three shares, such as 0.98,0.01,0.01."
        )
    # Rounded as they are written: 0.333,0.333,0.333 leaves nothing out either.
    if max(ratios) <= 1 and abs(sum(ratios) - 1) > 0.005:
        raise DataError(
            f"--split-ratio {text}: these shares add up to {sum(ratios):g}; they must add up to 1."
        )
    return [*ratios, 0.0][:3]


def parse_variables(text: str | None) -> tuple[tuple[str, Any], ...]:
    """The template variables of ``--chat-template-variables``, by name.

    Raises:
        DataError: it is no JSON object, or names what only the renderer sets.
    """
    if text is None:
        return ()
    try:
        values = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--chat-template-variables {text}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DataError(f"--chat-template-variables {text}: expected a JSON object.")
    if taken := reserved_in(values):
        raise DataError(
            f"--chat-template-variables {text}: {', '.join(taken)} is set by the rendering itself. Leave "
            "it out; special tokens stand in tokenizer_config.json."
        )
    return tuple(values.items())


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _seed(args: argparse.Namespace) -> int:
    return int(getattr(args, "seed", 1234))
