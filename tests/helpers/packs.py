"""Packs of given documents, in the form that `SFTDataset` and `MicroBatchIterator` give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_pack(
    ids: Tensor, loss_mask: Tensor, lengths: Sequence[int], groups: Tensor | None = None
) -> dict[str, Tensor]:
    """One pack.

    Args:
        ids: [seq_length].
        loss_mask: [seq_length].
        lengths: tokens of each document; the rest is padding.
        groups: [seq_length]; all 0 by default.
    """
    document_lengths = torch.zeros_like(ids)
    document_lengths[: len(lengths)] = torch.tensor(lengths)
    return {
        "input_ids": ids,
        "loss_mask": loss_mask,
        "groups": torch.zeros_like(ids) if groups is None else groups,
        "document_lengths": document_lengths,
    }


def stacked(packs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A micro batch: each field [micro batch, seq_length]."""
    return {name: torch.stack([pack[name] for pack in packs]) for name in packs[0]}
