"""Latent attention (MLA) of the local layers: packs, and gradients under tensor parallelism.

Upstream: megatron-core 0.19.2, `core/transformer/multi_latent_attention.py`,
`MLASelfAttention.get_query_key_value_tensors`: a row of packed documents loses its batch dimension, which
only Transformer Engine's attention does without. And the rotary part of the keys, which every head
shares, is gathered over the tensor parallel group without adding up the gradients of its ranks' heads
(Megatron-LM#1699): those of `linear_kv_down_proj` are wrong by a third under TP 2, the input's with them.
And `mla_qk_norm_config.py` norms queries that come from no latent vector, which Moonlight's are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from post_training.platform.patches import in_place_of


def apply() -> None:
    """Replace the function; Transformer Engine's own form of packs stays with it."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer import mla_qk_norm_config
    from megatron.core.transformer import multi_latent_attention as module

    @in_place_of((mla_qk_norm_config.QKNormConfigResolver, "_mla_fused_linear_or_default"))
    def _linear(original: Callable[..., Any], resolver: Any, spec: Any, name: str) -> Any:
        if name == "linear_q_proj" and resolver.fused_norm_linear_impl is None:
            return spec or resolver.linear_impl
        return original(resolver, spec, name)

    @in_place_of((module.MLASelfAttention, "get_query_key_value_tensors"))
    def _tensors(
        original: Callable[..., Any],
        layer: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, ...]:
        """Query, key and value [tokens, batch, heads, size], and what they are made from."""
        config, rotary, group = layer.config, layer.rotary_pos_emb, layer.tp_group
        length = rotary.get_rotary_seq_len(
            inference_context, None, hidden_states, config, packed_seq_params
        )
        angles = rotary(length)
        low, both = layer._qkv_down_projection(hidden_states)
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        if both.shape[-1] != sum(sizes):
            both = mappings.gather_from_tensor_model_parallel_region(both, group=group)
        latent, shared = both.split(sizes, dim=-1)
        if config.sequence_parallel:
            latent = mappings.scatter_to_sequence_parallel_region(latent, group=group)
        shared = mappings.copy_to_tensor_model_parallel_region(shared, group=group).unsqueeze(2)
        if config.q_lora_rank is None:
            query, _ = layer.linear_q_proj(low)
        else:
            low = layer.q_layernorm(low)
            query, _ = layer.linear_q_up_proj(low)
        latent = layer.kv_layernorm(latent)
        keys, _ = layer.linear_kv_up_proj(latent)
        heads = layer.num_attention_heads_per_partition
        query, keys = (x.unflatten(-1, (heads, -1)) for x in (query, keys))
        if inference_context is not None:
            begin = inference_context.sequence_len_offset
            angles = angles[begin : begin + len(query)]

        def turned(x: Tensor) -> Tensor:
            found: Tensor = module.apply_rotary_pos_emb(
                x,
                angles[: len(x)],
                config=config,
                mscale=layer._yarn_concentration_factor,
                cp_group=layer.pg_collection.cp,
                mla_rotary_interleaved=True,
            )
            return found

        plain, at = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        key, value = keys.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query = torch.cat([plain, turned(at)], dim=-1)
        key = torch.cat([key, turned(shared).expand(-1, -1, heads, -1)], dim=-1)
        return query, key, value, low, latent
