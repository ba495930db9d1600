"""Which tokens of a micro batch belong together: the one description every layer works from.

All of it follows from the lengths of the documents of a row, which packs carry and padding is part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from data.packs.dataset import with_padding
from post_training.batch.context_parallel import ContextParallelCut


@dataclass(frozen=True)
class RoutedDocuments:
    """What a router has to know of a micro batch; a document without a label is padding."""

    of_token: Tensor
    """The document of each of this context parallel rank's tokens: int64 [tokens]."""
    lengths: Tensor
    """Tokens of each document of the whole row: float32 [documents]."""
    trained: Tensor
    """Tokens of each document that have a label: float32 [documents]."""

    @classmethod
    def from_row(cls, lengths: Sequence[int], label_mask: Tensor) -> RoutedDocuments:
        """Describe the documents of a whole row.

        Args:
            lengths: tokens of each document.
            label_mask: 1 where the label is trained, else 0: [tokens].
        """
        each = torch.tensor(lengths)
        of_token = torch.repeat_interleave(torch.arange(len(lengths)), each)
        trained = torch.zeros(len(lengths)).index_add_(0, of_token, label_mask.float())
        return cls(of_token, each.float(), trained)

    def part(self, local_indices: Tensor) -> RoutedDocuments:
        """The same for the tokens that a context parallel rank holds (int64 [local tokens])."""
        return RoutedDocuments(
            self.of_token.index_select(0, local_indices), self.lengths, self.trained
        )


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of one micro batch, flattened to a single row of tokens.

    With Transformer Engine (`qkv_format="thd"`) its kernels read `cu_seqlens_*`. Without it
    (`qkv_format="sbhd"`) Megatron's attention layer leaves rotary embeddings per position, which
    `PackedRotaryEmbedding` gathers from `position_ids`, and `PackedAttention` isolates documents.

    Under context parallelism a rank holds a part of the row only. Its queries are then described piece
    by piece, each with the keys it may see.
    """

    position_ids: Tensor | None = None
    """Position of each of this rank's tokens inside its document: int64 [tokens]."""
    document_lengths: Tensor | None = None
    """Tokens of the whole document of each of this rank's tokens: int64 [tokens]."""
    query_lengths: list[int] | None = None
    """Tokens of each document, on the host; under context parallelism of each piece."""
    key_lengths: list[int] | None = None
    """Keys that each document or piece attends to; a piece sees them causally, its last token all."""
    key_indices: Tensor | None = None
    """Under context parallelism: where these keys are among those gathered from all ranks."""

    routed: RoutedDocuments | None = None
    """For models with experts."""

    @classmethod
    def from_lengths(cls, lengths: list[int], *, qkv_format: str) -> PackedDocuments:
        """Describe a row that holds documents of these lengths, on the host.

        Args:
            lengths: tokens of each document.
            qkv_format: `thd` for Transformer Engine, `sbhd` for the local spec.
        """
        bounds = [0, *accumulate(lengths)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(lengths)
        return cls(
            qkv_format=qkv_format,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=positions_in_documents(lengths),
            document_lengths=lengths_of_documents(lengths),
            query_lengths=lengths,
            key_lengths=lengths,
        )

    @classmethod
    def from_cut(cls, cut: ContextParallelCut, lengths: list[int]) -> PackedDocuments:
        """What one context parallel rank attends to, on the host.

        Args:
            cut: this rank's part of the row.
            lengths: tokens of each document of the whole row.
        """

        def cumulated(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

        return cls(
            # Transformer Engine's own context parallelism wants padded documents: not used.
            qkv_format="sbhd",
            cu_seqlens_q=cumulated(cut.query_lengths),
            cu_seqlens_kv=cumulated(cut.key_lengths),
            max_seqlen_q=max(cut.query_lengths),
            max_seqlen_kv=max(cut.key_lengths),
            position_ids=positions_in_documents(lengths).index_select(0, cut.local_indices),
            document_lengths=lengths_of_documents(lengths).index_select(0, cut.local_indices),
            query_lengths=cut.query_lengths,
            key_lengths=cut.key_lengths,
            key_indices=cut.key_indices,
        )


def row_lengths(document_lengths: Tensor) -> list[int]:
    """Tokens of each document of packs that are joined to a row; padding is cut in pretend documents.

    Args:
        document_lengths: int64 [packs, seq_length], 0 behind the last document of each pack.

    Returns:
        Lengths that add up to all tokens of the row.
    """
    return [
        length
        for pack in document_lengths
        for length in with_padding(pack[pack > 0].tolist(), len(pack))
    ]


def positions_in_documents(lengths: Sequence[int]) -> Tensor:
    """Position of each token of a row inside its document: int64 [tokens]."""
    each = torch.tensor(lengths)
    begins = each.cumsum(0) - each
    return torch.arange(int(each.sum())) - torch.repeat_interleave(begins, each)


def lengths_of_documents(lengths: Sequence[int]) -> Tensor:
    """Tokens of the document of each token of a row: int64 [tokens]."""
    each = torch.tensor(lengths)
    return torch.repeat_interleave(each, each)
