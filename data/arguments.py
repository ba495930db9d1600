"""The data flags, added to whatever parser the entry point uses (Megatron's, in training)."""

from __future__ import annotations

import argparse
import contextlib
from typing import Literal

from data.errors import DataError
from data.packing import PACKING_MODES
from data.prepare import prepare_documents
from data.token_cache import Documents

DataSplit = Literal["train", "valid", "test"]


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every data flag to ``parser``, leaving alone those that it has already.

    Megatron's own ``--chat-template`` and ``--seed`` mean the same here and are used as they are.
    """
    group = parser.add_argument_group(title="finetuning data")
    group.add_argument(
        "--finetune-data-files", nargs="+", default=None, metavar="PATH",
        help="Training data: json, jsonl or parquet files, folders or globs.",
    )  # fmt: skip
    group.add_argument(
        "--finetune-hf-dataset", default=None, metavar="NAME",
        help="Training data: a dataset on the HuggingFace hub, or a local folder of one.",
    )  # fmt: skip
    group.add_argument(
        "--finetune-data-split", default="train", metavar="SPLIT",
        help="Split of --finetune-hf-dataset to train on.",
    )  # fmt: skip
    group.add_argument("--valid-data-files", nargs="+", default=None, metavar="PATH")
    group.add_argument("--test-data-files", nargs="+", default=None, metavar="PATH")
    group.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error",
        help="Stop at the first bad row, or count and list bad rows and go on.",
    )  # fmt: skip
    group.add_argument(
        "--overlong", choices=("drop", "error"), default="drop",
        help="What happens to documents longer than --seq-length.",
    )  # fmt: skip
    group.add_argument("--conversation-format", default=None, metavar="NAME")
    group.add_argument(
        "--data-cache-dir", default=None, metavar="DIR",
        help="Folder of tokenised data, shared between runs.",
    )  # fmt: skip
    group.add_argument(
        "--packing", choices=PACKING_MODES, default="best-fit",
        help="How documents are put together into packs of --seq-length tokens.",
    )  # fmt: skip
    # The host parser may have it, with the same meaning.
    with contextlib.suppress(argparse.ArgumentError):
        group.add_argument("--chat-template", default=None, metavar="FILE")
    return parser


def prepare_documents_from_args(
    args: argparse.Namespace, split: DataSplit, tokenizer: object
) -> Documents | None:
    """Prepare the documents of one split as the flags say.

    Args:
        args: Parsed flags, with ``seq_length`` beside those of ``add_data_arguments``.
        split: ``train``, ``valid`` or ``test``.
        tokenizer: The HuggingFace tokenizer.

    Returns:
        The documents; None for a validation or test split that was not given.

    Raises:
        DataError: the flags or the data have to be put right.
    """
    if split == "train":
        files, hub = args.finetune_data_files or (), args.finetune_hf_dataset
        if not files and not hub:
            raise DataError(
                "no training data: give --finetune-data-files or --finetune-hf-dataset."
            )
    else:
        files, hub = getattr(args, f"{split}_data_files") or (), None
        if not files:
            return None
    return prepare_documents(
        files=files,
        hf_dataset=hub,
        split=args.finetune_data_split,
        tokenizer=tokenizer,
        seq_length=args.seq_length,
        cache_dir=args.data_cache_dir,
        on_bad_row=args.on_bad_row,
        overlong=args.overlong,
        chat_template=args.chat_template,
        conversation_format=args.conversation_format,
    )
