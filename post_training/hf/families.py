"""What an architecture is: the one table that flags, tensors, their names and the checks follow from.

Every family here is Llama's decoder but for what its entry in `FAMILIES` says; one that the layers can
express needs nothing else. `model_weights` lists what a model of the family is made of, under Megatron's
names and under those of the HuggingFace files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from post_training.tensors.experts import Experts, expert_weights, mlp_weights
from post_training.tensors.hybrid import (
    MAMBA_2,
    NEMOTRON_H,
    SYMBOLS,
    hybrid_flags,
    hybrid_weights,
)
from post_training.tensors.weight import Layout, Weight, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Factors:
    """By what a family multiplies."""

    embedding: float = 1.0
    residual: float = 1.0
    """What attention and feed-forward layers add to the residual stream."""
    scores: float | None = None
    """Those of attention; None: one over the root of the head's size."""
    logits: float = 1.0


# Of a layer, by Megatron's name.
_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama."""

    qkv_bias: bool | str = False
    """Queries, keys and values have a bias; their output has none. A key of config.json says whether."""
    qk_norm: bool = False
    """Each head of the queries and keys is normed."""
    biases: bool = False
    """Every matrix has a bias, the router's and the experts' too."""
    latent: bool = False
    """Queries, keys and values come from a latent vector (MLA)."""
    sinks: bool = False
    """Each head has a score to which no value belongs."""
    hybrid: bool = False
    """Layers are of several kinds, among them state-space ones; `tensors/hybrid.py` says all of it."""
    local: bool = False
    """Only the local layers compute it, not those of Transformer Engine."""
    windows: bool = False
    """Layers may attend to a sliding window."""
    partial_rotary: bool = False
    """Only the first numbers of a head may be turned."""
    fused: tuple[str, ...] = ()
    """Which of `qkv_proj` and `gate_up_proj` are one tensor each."""
    norms: Mapping[str, str] = field(default_factory=_NORMS.copy)
    """Of a layer: their names here, and in the files."""
    factors: Callable[[PretrainedConfig], Factors] = lambda config: Factors()
    experts: Experts | None = None
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of config.json that the layers can express, where they are not those of `OPTIONS`."""
    flags: Callable[[PretrainedConfig], dict[str, Any]] = lambda config: {}
    """Megatron's arguments that follow from config.json in this family only."""


# An option that config.json does not name has the first value.
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
}


def _without_rope(config: PretrainedConfig) -> dict[str, Any]:
    """SmolLM3 says 1 for a layer with rotary embeddings, Megatron for one without."""
    return {"no_rope_freq": [1 - r for r in config.no_rope_layers[: config.num_hidden_layers]]}


def _gpt_oss(config: PretrainedConfig) -> dict[str, Any]:
    """Sinks, and an MLP of x sigmoid(1.702 x), clamped, by up + 1."""
    return {
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "swiglu": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": getattr(config, "swiglu_limit", 7.0),
    }


def _deepseek_v3(config: PretrainedConfig) -> dict[str, Any]:
    """Latent attention, and a router whose scores are sigmoids, limited to groups of experts."""
    rope = config.rope_parameters
    rope = {} if rope.get("rope_type", "default") == "default" else rope
    limited = config.n_group > config.topk_group
    return {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "num_query_groups": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_layernorm": True,
        # The frequencies are those of transformers; scores are scaled as it does.
        "rope_type": "rope",
        "rotary_scaling_factor": float(rope.get("factor") or 1.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_num_groups": config.n_group if limited else None,
        "moe_router_group_topk": config.topk_group if limited else None,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": config.n_shared_experts
        * config.moe_intermediate_size,
    }


def _granite(config: PretrainedConfig) -> Factors:
    return Factors(
        config.embedding_multiplier,
        config.residual_multiplier,
        config.attention_multiplier,
        1.0 / config.logits_scaling,
    )


FAMILIES: Mapping[str, Family] = {
    "DeepseekV3ForCausalLM": Family(
        latent=True,
        local=True,
        experts=Experts(
            count="n_routed_experts",
            bias="mlp.gate.e_score_correction_bias",
            shared="mlp.shared_experts",
        ),
        options={
            "rope_interleave": (True,),
            "norm_topk_prob": (True,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
        flags=_deepseek_v3,
    ),
    "Ernie4_5ForCausalLM": Family(
        options={"use_bias": (False,)}, flags=lambda config: {"rotary_interleaved": True}
    ),
    "Glm4ForCausalLM": Family(
        qkv_bias="attention_bias",
        partial_rotary=True,
        local=True,
        fused=("gate_up_proj",),
        norms=_NORMS
        | {"self_attn_bda.norm": "post_self_attn_layernorm", "mlp_bda.norm": "post_mlp_layernorm"},
        options={"attention_bias": (True, False)},
        flags=lambda config: {"rotary_interleaved": True},
    ),
    "GptOssForCausalLM": Family(
        biases=True,
        sinks=True,
        windows=True,
        local=True,
        experts=Experts(router="mlp.router.weight", size="intermediate_size", stacked=True),
        options={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
        flags=_gpt_oss,
    ),
    "GraniteForCausalLM": Family(local=True, factors=_granite),
    "LlamaForCausalLM": Family(),
    "Mamba2ForCausalLM": Family(hybrid=True, local=True, options=MAMBA_2, flags=hybrid_flags),
    "MistralForCausalLM": Family(windows=True),
    "MixtralForCausalLM": Family(
        windows=True,
        experts=Experts(
            router="block_sparse_moe.gate.weight",
            folder="block_sparse_moe.experts",
            projections=("w1", "w3", "w2"),
            size="intermediate_size",
        ),
    ),
    "NemotronHForCausalLM": Family(hybrid=True, local=True, options=NEMOTRON_H, flags=hybrid_flags),
    "Phi3ForCausalLM": Family(
        windows=True, partial_rotary=True, local=True, fused=("qkv_proj", "gate_up_proj")
    ),
    # transformers gives Qwen2 its biases whatever attention_bias says.
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, windows=True, options={"attention_bias": (True, False)}
    ),
    "Qwen3ForCausalLM": Family(qk_norm=True, windows=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, windows=True, experts=Experts(normed=False)),
    "SeedOssForCausalLM": Family(
        qkv_bias=True, options={"attention_bias": (True,), "attention_out_bias": (False,)}
    ),
    "SmolLM3ForCausalLM": Family(windows=True, flags=_without_rope),
}


def why_not_megatron(config: Any) -> str | None:
    """Why Megatron's layers cannot express an architecture; None where they can.

    Args:
        config: a configuration, or the keys of config.json as attributes.
    """
    named = getattr(config, "architectures", None) or ["(none named)"]
    found = named[0] if isinstance(named, list) else named
    if not isinstance(found, str) or found not in FAMILIES:
        return f"architecture {found} cannot be loaded; these can: {', '.join(FAMILIES)}"
    for key, values in {**OPTIONS, **FAMILIES[found].options}.items():
        value = getattr(config, key, values[0])
        if value not in values:
            return (
                f"{key} {value} is not supported for {found}; only {' and '.join(map(str, values))}"
            )
    experts = FAMILIES[found].experts
    if experts and getattr(config, "num_experts_per_tok", 0) == 1:
        # Its weight is 1, which Megatron can only make of several.
        if getattr(config, "norm_topk_prob", experts.normed):
            return f"num_experts_per_tok 1 is not supported for {found}, whose weights add up to 1"
    kinds = tuple(SYMBOLS) if FAMILIES[found].hybrid else ("full_attention", "sliding_attention")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in kinds:
            return f"layer_types {kind} is not supported for {found}"
    return None


def family_of(config: PretrainedConfig) -> Family:
    """The entry of a configuration whose architecture has been checked."""
    return FAMILIES[config.architectures[0]]


def head_dim(config: PretrainedConfig) -> int:
    """Size of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def has_qkv_bias(config: PretrainedConfig) -> bool:
    """Whether queries, keys and values have a bias."""
    said = family_of(config).qkv_bias
    return bool(getattr(config, said)) if isinstance(said, str) else said


def model_weights(config: PretrainedConfig) -> dict[str, Weight]:
    """All that a model is made of.

    Args:
        config: a HuggingFace configuration of one of `FAMILIES`.

    Returns:
        By the name in a whole Megatron model of local layers. Tied output layers are not listed.
    """
    family, vocabulary = family_of(config), (config.vocab_size, config.hidden_size)
    if family.hybrid:
        return hybrid_weights(config)
    weights = {
        "embedding.word_embeddings.weight": Weight(
            "vocabulary", {"model.embed_tokens.weight": vocabulary}
        ),
        "decoder.final_layernorm.weight": Weight(
            "replicated", {"model.norm.weight": (config.hidden_size,)}
        ),
    }
    if not config.tie_word_embeddings:
        weights["output_layer.weight"] = Weight("vocabulary", {"lm_head.weight": vocabulary})
    every = [0] * config.num_hidden_layers
    for layer, has_experts in enumerate(family.experts.layers(config) if family.experts else every):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, norm in family.norms.items():
            norms = {f"{there}{norm}.weight": (config.hidden_size,)}
            weights[f"{here}{name}.weight"] = Weight("replicated", norms)
        attention = _latent_attention if family.latent else _attention
        weights |= attention(config, family, here, there)
        if family.experts and has_experts:
            weights |= expert_weights(config, family.experts, here, there)
        else:
            names = tuple(f"{there}mlp.{part}_proj" for part in ("gate", "up", "down"))
            dense = mlp_weights(config.hidden_size, config.intermediate_size, here + "mlp.", names)
            if "gate_up_proj" in family.fused:
                dense[here + "mlp.linear_fc1.weight"] = _one_tensor(
                    dense[here + "mlp.linear_fc1.weight"], f"{there}mlp.gate_up_proj.weight"
                )
            weights |= dense
    return weights


def _attention(config: PretrainedConfig, family: Family, here: str, there: str) -> Weights:
    """Attention of a layer."""
    hidden, head, groups = config.hidden_size, head_dim(config), config.num_key_value_heads
    queries = config.num_attention_heads * head
    rows = {"q_proj": queries, "k_proj": groups * head, "v_proj": groups * head}
    inside, outside = here + "self_attention.", there + "self_attn."

    def qkv(kind: str, *columns: int) -> Weight:
        parts = {f"{outside}{p}.{kind}": (n, *columns) for p, n in rows.items()}
        weight = Weight("qkv", parts, groups)
        name = f"{outside}qkv_proj.{kind}"
        return _one_tensor(weight, name) if "qkv_proj" in family.fused else weight

    def norm(name: str, size: int) -> Weight:
        return Weight("replicated", {f"{name}.weight": (size,)})

    output = {outside + "o_proj.weight": (hidden, queries)}
    weights = {
        inside + "linear_qkv.weight": qkv("weight", hidden),
        inside + "linear_proj.weight": Weight("columns", output),
    }
    if has_qkv_bias(config) or family.biases:
        weights[inside + "linear_qkv.bias"] = qkv("bias")
    if family.biases:
        bias = {outside + "o_proj.bias": (hidden,)}
        weights[inside + "linear_proj.bias"] = Weight("replicated", bias)
    if family.sinks:
        sinks = {outside + "sinks": (config.num_attention_heads,)}
        weights[inside + "core_attention.softmax_offset"] = Weight("rows", sinks)
    if family.qk_norm:
        for part in ("q", "k"):
            weights[f"{inside}{part}_layernorm.weight"] = norm(f"{outside}{part}_norm", head)
    return weights


def _one_tensor(weight: Weight, name: str) -> Weight:
    """A parameter whose tensors lie below one another in one."""
    rows = tuple(shape[0] for shape in weight.tensors.values())
    columns = next(iter(weight.tensors.values()))[1:]
    return replace(weight, tensors={name: (sum(rows), *columns)}, sections=rows)


def _latent_attention(config: PretrainedConfig, family: Family, here: str, there: str) -> Weights:
    """Attention of a layer from latent vectors."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    low, latent, rotary = config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim
    query, value = heads * (config.qk_nope_head_dim + rotary), heads * config.v_head_dim
    inside, outside = here + "self_attention.", there + "self_attn."
    names: dict[str, tuple[Layout, str, tuple[int, ...]]] = {
        "linear_kv_down_proj": ("rows", "kv_a_proj_with_mqa", (latent + rotary, hidden)),
        "kv_layernorm": ("replicated", "kv_a_layernorm", (latent,)),
        "linear_kv_up_proj": ("rows", "kv_b_proj", (query - heads * rotary + value, latent)),
        "linear_proj": ("columns", "o_proj", (hidden, value)),
    }
    if low is None:
        names["linear_q_proj"] = ("rows", "q_proj", (query, hidden))
    else:
        names |= {
            "linear_q_down_proj": ("rows", "q_a_proj", (low, hidden)),
            "q_layernorm": ("replicated", "q_a_layernorm", (low,)),
            "linear_q_up_proj": ("rows", "q_b_proj", (query, low)),
        }
    return {
        f"{inside}{name}.weight": Weight(layout, {f"{outside}{tensor}.weight": shape})
        for name, (layout, tensor, shape) in names.items()
    }
