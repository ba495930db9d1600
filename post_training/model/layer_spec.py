"""The layer spec: Transformer Engine's where it is asked for, else the local one, mended."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from post_training.hf.families import family_of
from post_training.model.attention import PackedAttention
from post_training.model.norm import LatentNorm, LocalNorm
from post_training.model.residual import ScaledAdd
from post_training.model.router import DocumentRouter


def uses_packed_attention(settings: Any) -> bool:
    """Whether core attention is our own; `settings` are arguments or a transformer config."""
    special = settings.window_size is not None or settings.softmax_type != "vanilla"
    return special or settings.transformer_impl == "local" or settings.context_parallel_size > 1


def decoder_block_spec(
    config: Any,
    vp_stage: int | None = None,
    hf_config: Any = None,
    *,
    norms_apart: bool = False,
) -> TransformerBlockSubmodules:
    """Spec of the decoder layers of one pipeline stage.

    Args:
        config: a Megatron `GPTModelConfig`.
        vp_stage: the virtual pipeline stage, or None.
        hf_config: the HuggingFace configuration, or None: what Megatron's own does not say.
        norms_apart: Transformer Engine's norms are layers of their own, so that what the matrices behind
            them read is seen from outside, as low-rank factors must.

    Returns:
        Megatron's block spec. For `--transformer-impl local` its core attention is `PackedAttention`
        and its norms are `LocalNorm`: Megatron's own refuse packed sequences and sequence parallelism.
        With Transformer Engine the core attention is replaced under context parallelism, where its
        kernels want every document padded, and in models with sliding windows or sinks. Layers with experts
        get a `DocumentRouter`.
    """
    transformer = config.transformer
    use_te = transformer.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=use_te,
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        attention = parts.self_attention.submodules
        if uses_packed_attention(transformer):
            attention.core_attention = PackedAttention
        if isinstance(parts.mlp, functools.partial) and parts.mlp.func is MoELayer:
            experts = dataclasses.replace(parts.mlp.keywords["submodules"], router=DocumentRouter)
            parts.mlp = functools.partial(MoELayer, submodules=experts)
        if use_te:
            if norms_apart:
                _take_norms_apart(parts)
            continue
        if hf_config is not None:
            _add_by_family(parts, transformer, hf_config)
        parts.input_layernorm = LocalNorm
        parts.pre_mlp_layernorm = LocalNorm
        latent = transformer.multi_latent_attention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, LatentNorm if latent else LocalNorm)
        if latent and transformer.q_lora_rank is None:
            attention.q_layernorm = IdentityOp
    if not use_te:
        block.layer_norm = LocalNorm
    return block


def _take_norms_apart(parts: Any) -> None:
    """Turn Transformer Engine's layers that begin with a norm into a norm and a layer."""
    fused = te.TELayerNormColumnParallelLinear
    attention = parts.self_attention.submodules
    if attention.linear_qkv is fused:
        parts.input_layernorm, attention.linear_qkv = te.TENorm, te.TEColumnParallelLinear
    dense = parts.mlp.keywords["submodules"]
    if getattr(dense, "linear_fc1", None) is fused:
        parts.pre_mlp_layernorm = te.TENorm
        dense = dataclasses.replace(dense, linear_fc1=te.TEColumnParallelLinear)
        parts.mlp = functools.partial(parts.mlp.func, submodules=dense)


def _add_by_family(parts: Any, transformer: Any, hf_config: Any) -> None:
    """Give a layer's spec the norms and the factor of its family, if it has any behind its parts."""
    family = family_of(hf_config)
    factor = family.factors(hf_config).residual
    for name in ("self_attn_bda", "mlp_bda"):
        if (normed := f"{name}.norm" in family.norms) or factor != 1.0:
            params = {"config": transformer, "factor": factor, "normed": normed}
            setattr(parts, name, ModuleSpec(module=ScaledAdd, params=params))
