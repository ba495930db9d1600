"""Rotary embeddings whose positions restart at every document of a pack."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from post_training.batch.packed_documents import PackedDocuments


class PackedRotaryEmbedding(torch.nn.Module):
    """A drop-in for `GPTModel.rotary_pos_emb` that looks positions up instead of counting them.

    Megatron's own packed path splits every query and key by document in every layer. Here the angles
    of all positions are computed once, gathered by `position_ids` once a micro batch, and applied to
    the whole row at once.
    """

    def __init__(self, original: RotaryEmbedding, inv_freq: torch.Tensor | None = None) -> None:
        """Take over from `original`, with other inverse frequencies where `inv_freq` is given.

        Args:
            original: the embedding that `GPTModel` built from its flags.
            inv_freq: float32 [rotary_dim / 2], from the HuggingFace configuration.
        """
        super().__init__()
        self.original = original
        if inv_freq is not None:
            original.inv_freq = inv_freq.to(original.inv_freq.device)
        self._angles = torch.empty(0)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> PackedDocuments | int:
        """What `GPTModel` hands on to `forward`: the packed documents themselves where there are any."""
        if isinstance(packed_seq_params, PackedDocuments) and packed_seq_params.qkv_format != "thd":
            return packed_seq_params
        length: int = self.original.get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params
        )
        return length

    def forward(
        self, positions: PackedDocuments | int, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Angles of each token.

        Args:
            positions: the packed documents, or a number of positions counted from 0.
            packed_seq: as in Megatron: the angles are sliced for context parallelism by the kernel.
            cp_group: as in Megatron: the context parallel group.

        Returns:
            float32 [tokens, 1, 1, rotary_dim].
        """
        if not isinstance(positions, PackedDocuments):
            emb: torch.Tensor = self.original(positions, packed_seq=packed_seq, cp_group=cp_group)
            return emb
        assert positions.position_ids is not None
        # The last token of a document sees as many keys as there are positions.
        if self._angles.shape[0] < positions.max_seqlen_kv:
            self._angles = self.original.get_emb(positions.max_seqlen_kv)
        return self._angles.index_select(0, positions.position_ids)
