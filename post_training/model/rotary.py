"""Rotary embeddings whose positions restart at every document of a pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from post_training.batch.packed_documents import PackedDocuments
from post_training.hf.rotary import RotaryScaling


@dataclass(frozen=True)
class Unpacked:
    """Rows that are one document each."""

    table: int
    """Positions that angles are wanted of, from 0."""
    prompt: int
    """Tokens that were given together, from position 0 on; in a generation others follow one by one."""


class PackedRotaryEmbedding(torch.nn.Module):
    """A drop-in for `GPTModel.rotary_pos_emb` that looks positions up instead of counting them.

    Megatron's own packed path splits every query and key by document in every layer. Here the angles
    of all positions are computed once, gathered by `position_ids` once a micro batch, and applied to
    the whole row at once. Where frequencies depend on the length of a document (`RotaryScaling`), there is
    no table: each token's angles are computed with those of its own document.
    """

    def __init__(self, original: RotaryEmbedding, scaling: RotaryScaling | None = None) -> None:
        """Take over from `original`, with other frequencies where `scaling` is given.

        Args:
            original: the embedding that `GPTModel` built from its flags.
            scaling: of the HuggingFace configuration.
        """
        super().__init__()
        self.original = original
        if scaling is not None:
            original.inv_freq = scaling.inv_freq.to(original.inv_freq.device)
        self.scaling = scaling
        self.by_length = scaling is not None and scaling.original_length is not None
        self._angles = torch.empty(0)
        self._prompt = 0

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> PackedDocuments | Unpacked | int:
        """What `GPTModel` hands on to `forward`: the packed documents themselves where there are any."""
        if isinstance(packed_seq_params, PackedDocuments) and packed_seq_params.qkv_format != "thd":
            return packed_seq_params
        count = self.original.get_rotary_seq_len
        rest = (transformer, transformer_input, transformer_config)
        table: int = count(inference_context, *rest, packed_seq_params)
        if not self.by_length:
            return table
        if inference_context is None or inference_context.sequence_len_offset == 0:
            self._prompt = count(None, *rest)
        return Unpacked(table, self._prompt)

    def forward(
        self,
        positions: PackedDocuments | Unpacked | int,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> torch.Tensor:
        """Angles of each token.

        Args:
            positions: the packed documents, or a number of positions counted from 0.
            packed_seq: as in Megatron: the angles are sliced for context parallelism by the kernel.
            cp_group: as in Megatron: the context parallel group.

        Returns:
            float32 [tokens, 1, 1, rotary_dim].
        """
        if isinstance(positions, Unpacked):
            places = torch.arange(positions.table, device=self.original.inv_freq.device)
            # As in the cache of transformers: a key keeps the angle of the call that computed it.
            return self._by_length(places, (places + 1).clamp(min=positions.prompt))
        if not isinstance(positions, PackedDocuments):
            emb: torch.Tensor = self.original(positions, packed_seq=packed_seq, cp_group=cp_group)
            return emb
        assert positions.position_ids is not None
        if self.by_length:
            assert positions.document_lengths is not None
            return self._by_length(positions.position_ids, positions.document_lengths)
        # The last token of a document sees as many keys as there are positions.
        if self._angles.shape[0] < positions.max_seqlen_kv:
            self._angles = self.original.get_emb(positions.max_seqlen_kv)
        return self._angles.index_select(0, positions.position_ids)

    def _by_length(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Angles of tokens at `positions` of documents of `lengths`, both int64 [tokens]."""
        assert self.scaling is not None
        angles = positions.unsqueeze(1).float() * self.scaling.frequencies(lengths)
        if self.original.rotary_interleaved:
            angles = angles.repeat_interleave(2, dim=1)
        else:
            angles = torch.cat((angles, angles), dim=1)
        return angles[:, None, None, :]


def install_rotary(chunk: torch.nn.Module, scaling: RotaryScaling | None) -> None:
    """Put `PackedRotaryEmbedding` into a model chunk.

    Args:
        chunk: a part of the model; nothing happens to one without rotary embeddings.
        scaling: of the HuggingFace configuration, if there is one.
    """
    # Latent attention has an embedding in each layer: one serves all.
    layers: list[Any] = [m for m in chunk.modules() if isinstance(m, MultiLatentAttention)]
    owners = [chunk] if hasattr(chunk, "rotary_pos_emb") else layers
    if not owners:
        return
    embedding = PackedRotaryEmbedding(owners[0].rotary_pos_emb, scaling)
    for owner in owners:
        owner.rotary_pos_emb = embedding
    if scaling is None or scaling.attention_factor == 1.0:
        return
    for module in chunk.modules():
        if isinstance(module, Attention):
            # Megatron's own name for what it derives from its flags of yarn.
            module._yarn_concentration_factor = scaling.attention_factor
            # The fused kernel for packs passes over it.
            module.config.apply_rope_fusion = False
