"""Which tokens of a micro batch belong together: the one description every layer works from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from post_training.context_parallel import ContextParallelCut


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
    def from_row(cls, position_ids: Tensor, label_mask: Tensor, documents: int) -> RoutedDocuments:
        """Describe the documents of a whole row.

        Args:
            position_ids: int64 [tokens], 0 where a document begins.
            label_mask: 1, or 1 + the number of its source, where the label is trained: [tokens].
            documents: how many there are.
        """
        of_token = (position_ids == 0).cumsum(0) - 1

        def total(values: Tensor) -> Tensor:
            sums = torch.zeros(documents, dtype=torch.float32)
            return sums.index_add_(0, of_token, values.float())

        return cls(of_token, total(torch.ones_like(label_mask)), total(label_mask > 0))

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
    query_lengths: list[int] | None = None
    """Tokens of each document, on the host; under context parallelism of each piece."""
    key_lengths: list[int] | None = None
    """Keys that each document or piece attends to; a piece sees them causally, its last token all."""
    key_indices: Tensor | None = None
    """Under context parallelism: where these keys are among those gathered from all ranks."""

    routed: RoutedDocuments | None = None
    """For models with experts."""

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, *, qkv_format: str) -> PackedDocuments:
        """Find the documents: one begins wherever the position is 0.

        Args:
            position_ids: on the host: int64 [tokens]; the first is 0.
            qkv_format: `thd` for Transformer Engine, `sbhd` for the local spec.
        """
        bounds = document_bounds(position_ids)
        lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(lengths)
        return cls(
            qkv_format=qkv_format,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            query_lengths=lengths,
            key_lengths=lengths,
        )

    @classmethod
    def from_cut(cls, cut: ContextParallelCut, local_position_ids: Tensor) -> PackedDocuments:
        """What one context parallel rank attends to.

        Args:
            cut: this rank's part of the row.
            local_position_ids: positions of its tokens inside their documents, on the host:
                int64 [local tokens].
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
            position_ids=local_position_ids,
            query_lengths=cut.query_lengths,
            key_lengths=cut.key_lengths,
            key_indices=cut.key_indices,
        )


def document_bounds(position_ids: Tensor) -> list[int]:
    """Where each document of a row begins, and the number of tokens in the row.

    Args:
        position_ids: int64 [tokens]; 0 where a document begins, and at the first token.
    """
    return [*torch.nonzero(position_ids == 0).flatten().tolist(), position_ids.numel()]
