"""What a run learns from stored features."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

from post_training.batch.splits import Split
from post_training.distillation.draft_vocabulary import most_trained_tokens


def stored_features(args: argparse.Namespace) -> dict[str, tuple[int, torch.dtype]] | None:
    """Width and dtype of each feature that the packs of a run carry, by name; None without features."""
    return None


def draft_tokens(args: argparse.Namespace, splits: Mapping[str, Split]) -> Tensor | None:
    """The tokens that a new draft can write: int64 [draft vocabulary], ascending; None: all."""
    if args.draft is None or args.draft_vocab_size is None or "train" not in splits:
        return None
    documents = splits["train"].documents
    return most_trained_tokens(documents, args.draft_vocab_size, args.vocab_size)
