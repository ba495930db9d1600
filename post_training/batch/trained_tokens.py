"""Which tokens of a micro batch have a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainedTokens:
    """Which rows of a micro batch have a label, and with which weight."""

    indices: Tensor
    """Positions in the flattened micro batch: int64 [trained]. Never empty, see `from_mask`."""
    weights: Tensor
    """1 for a trained token, 0 for the stand-in of an empty micro batch: float32 [trained]."""
    groups: Tensor
    """Which group the label of each belongs to, from 0: int64 [trained]. A group is a source of a mixture,
    or what the isolation check tells apart."""

    @classmethod
    def from_mask(cls, mask: Tensor, groups: Tensor) -> TrainedTokens:
        """Find the trained tokens.

        A micro batch without any (a filler pack) keeps its first token at weight 0, because
        collectives of an empty tensor are not defined on every backend.

        Args:
            mask: 1 where the label is trained, else 0: [tokens].
            groups: the group of each label: int64 [tokens].
        """
        indices = torch.nonzero(mask).flatten()
        if indices.numel() == 0:
            nothing = mask.new_zeros(1, dtype=torch.int64)
            return cls(nothing, nothing.float(), nothing)
        weights = torch.ones_like(indices, dtype=torch.float32)
        return cls(indices, weights, groups.index_select(0, indices))
