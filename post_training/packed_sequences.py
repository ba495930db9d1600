"""Which tokens of a micro batch belong together: the one description every layer works from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of one micro batch, flattened to a single row of tokens.

    With Transformer Engine (`qkv_format="thd"`) its kernels read `cu_seqlens_*`. Without it
    (`qkv_format="sbhd"`) Megatron's attention layer leaves rotary embeddings per position, which
    `PackedRotaryEmbedding` gathers from `position_ids`, and `PackedAttention` isolates documents.
    """

    position_ids: torch.Tensor | None = None
    """Position of each token inside its document: int64 [tokens]."""
    document_lengths: list[int] | None = None
    """Tokens of each document, on the host."""

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor, *, qkv_format: str) -> PackedDocuments:
        """Find the documents: one begins wherever the position is 0.

        Args:
            position_ids: int64 [tokens]; the first is 0.
            qkv_format: `thd` for Transformer Engine, `sbhd` for the local spec.
        """
        tokens = position_ids.numel()
        # One copy to the host a micro batch: attention kernels want the longest length as a number.
        starts = torch.nonzero(position_ids == 0).flatten().tolist()
        bounds = [*starts, tokens]
        lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)
        longest = max(lengths)
        return cls(
            qkv_format=qkv_format,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            document_lengths=lengths,
        )
