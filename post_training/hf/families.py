"""What an architecture is: the one table that flags, tensors, their names and the checks follow from.

Every family here is Llama's decoder but for what its entry in `FAMILIES` says; one that the layers can
express needs nothing else. `model_weights` lists what a model of the family is made of, under Megatron's
names and under those of the HuggingFace files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Layout = Literal["replicated", "vocabulary", "qkv", "rows", "gate_up", "columns"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter, and the HuggingFace tensors that make it up."""

    layout: Layout
    """How the tensors are joined and split over the tensor parallel group."""
    tensors: Shapes
    """Shapes of the HuggingFace tensors by their names, in the order in which they are joined."""
    groups: int = 1
    """Query groups by which the rows of `qkv` are interleaved."""
    of_expert: bool = False
    """Split over the expert tensor parallel group instead."""
    expert: int | None = None
    """Its place in tensors that hold every expert. Their matrices stand transposed, and the columns of gate
    and up in turn."""


Weights = dict[str, Weight]


@dataclass(frozen=True)
class Experts:
    """What the experts of a family are called, below `model.layers.N.` and in config.json."""

    router: str = "mlp.gate.weight"
    folder: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down."""
    size: str = "moe_intermediate_size"
    """The key of config.json that holds an expert's width."""
    count: str = "num_experts"
    """The key that holds the number of experts."""
    bias: str | None = None
    """What is added to the scores that experts are chosen by: no part of their weights, and not trained."""
    shared: str | None = None
    """The folder of what every token goes through, beside its experts."""
    stacked: bool = False
    """One tensor holds every expert, with gate and up in one, and another their biases."""

    def flags(self, config: PretrainedConfig) -> dict[str, Any]:
        """Megatron's arguments about experts."""
        return {
            "num_experts": getattr(config, self.count),
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": getattr(config, self.size),
            "moe_layer_freq": self.layers(config),
            # Softmax over the chosen logits equals a renormalised softmax over all of them.
            "moe_router_pre_softmax": not getattr(config, "norm_topk_prob", True),
        }

    @staticmethod
    def layers(config: PretrainedConfig) -> list[int]:
        """1 for each layer with experts, 0 for each without."""
        dense = getattr(config, "mlp_only_layers", None) or ()
        step = getattr(config, "decoder_sparse_step", 1)
        first = getattr(config, "first_k_dense_replace", None) or 0
        return [
            int(layer not in dense and layer >= first and (layer + 1) % step == 0)
            for layer in range(config.num_hidden_layers)
        ]


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama."""

    qkv_bias: bool = False
    """Queries, keys and values have a bias; their output has none."""
    qk_norm: bool = False
    """Each head of the queries and keys is normed."""
    biases: bool = False
    """Every matrix has a bias, the router's and the experts' too."""
    latent: bool = False
    """Queries, keys and values come from a latent vector (MLA)."""
    sinks: bool = False
    """Each head has a score to which no value belongs."""
    local: bool = False
    """Only the local layers compute it, not those of Transformer Engine."""
    windows: bool = False
    """Layers may attend to a sliding window."""
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
    "GptOssForCausalLM": Family(
        biases=True,
        sinks=True,
        windows=True,
        local=True,
        experts=Experts(router="mlp.router.weight", size="intermediate_size", stacked=True),
        options={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
        flags=_gpt_oss,
    ),
    "LlamaForCausalLM": Family(),
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
    # transformers gives Qwen2 its biases whatever attention_bias says.
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, windows=True, options={"attention_bias": (True, False)}
    ),
    "Qwen3ForCausalLM": Family(qk_norm=True, windows=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, windows=True, experts=Experts()),
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
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            return f"layer_types {kind} is not supported for {found}"
    return None


def family_of(config: PretrainedConfig) -> Family:
    """The entry of a configuration whose architecture has been checked."""
    return FAMILIES[config.architectures[0]]


def head_dim(config: PretrainedConfig) -> int:
    """Size of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


def model_weights(config: PretrainedConfig) -> dict[str, Weight]:
    """All that a model is made of.

    Args:
        config: a HuggingFace configuration of one of `FAMILIES`.

    Returns:
        By the name in a whole Megatron model of local layers. Tied output layers are not listed.
    """
    family, vocabulary = family_of(config), (config.vocab_size, config.hidden_size)
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
        for name, norm in _NORMS.items():
            norms = {f"{there}{norm}.weight": (config.hidden_size,)}
            weights[f"{here}{name}.weight"] = Weight("replicated", norms)
        attention = _latent_attention if family.latent else _attention
        weights |= attention(config, family, here, there)
        if family.experts and has_experts:
            weights |= _experts(config, family.experts, here, there)
        else:
            names = tuple(f"{there}mlp.{part}_proj" for part in ("gate", "up", "down"))
            weights |= _mlp(config.hidden_size, config.intermediate_size, here + "mlp.", names)
    return weights


def _attention(config: PretrainedConfig, family: Family, here: str, there: str) -> Weights:
    """Attention of a layer."""
    hidden, head, groups = config.hidden_size, head_dim(config), config.num_key_value_heads
    queries = config.num_attention_heads * head
    rows = {"q_proj": queries, "k_proj": groups * head, "v_proj": groups * head}
    inside, outside = here + "self_attention.", there + "self_attn."

    def qkv(kind: str, *columns: int) -> Weight:
        return Weight(
            "qkv", {f"{outside}{p}.{kind}": (n, *columns) for p, n in rows.items()}, groups
        )

    def norm(name: str, size: int) -> Weight:
        return Weight("replicated", {f"{name}.weight": (size,)})

    output = {outside + "o_proj.weight": (hidden, queries)}
    weights = {
        inside + "linear_qkv.weight": qkv("weight", hidden),
        inside + "linear_proj.weight": Weight("columns", output),
    }
    if family.qkv_bias or family.biases:
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


def _experts(config: PretrainedConfig, experts: Experts, here: str, there: str) -> Weights:
    """Router and experts of a layer."""
    count, size = getattr(config, experts.count), getattr(config, experts.size)
    router = {there + experts.router: (count, config.hidden_size)}
    weights = {here + "mlp.router.weight": Weight("replicated", router)}
    if experts.bias is not None:
        bias = {there + experts.bias: (count,)}
        weights[here + "mlp.router.expert_bias"] = Weight("replicated", bias)
    if experts.shared is not None:
        names = tuple(f"{there}{experts.shared}.{part}" for part in experts.projections)
        width = size * config.n_shared_experts
        weights |= _mlp(config.hidden_size, width, here + "mlp.shared_experts.", names)
    if experts.stacked:
        return weights | _stacked_experts(config, experts, here, there)
    for number in range(count):
        names = tuple(f"{there}{experts.folder}.{number}.{part}" for part in experts.projections)
        inside = f"{here}mlp.experts.local_experts.{number}."
        weights |= _mlp(config.hidden_size, size, inside, names, of_expert=True)
    return weights


def _stacked_experts(config: PretrainedConfig, experts: Experts, here: str, there: str) -> Weights:
    """Experts of a layer, and the biases of its router and of theirs."""
    hidden, size = config.hidden_size, getattr(config, experts.size)
    count = getattr(config, experts.count)
    router = experts.router.replace(".weight", ".bias")
    weights = {here + router: Weight("replicated", {there + router: (count,)})}
    tensors: dict[str, tuple[Layout, str, tuple[int, ...]]] = {
        "linear_fc1.weight": ("gate_up", "gate_up_proj", (hidden, 2 * size)),
        "linear_fc1.bias": ("gate_up", "gate_up_proj_bias", (2 * size,)),
        "linear_fc2.weight": ("columns", "down_proj", (size, hidden)),
        "linear_fc2.bias": ("replicated", "down_proj_bias", (hidden,)),
    }
    for number in range(count):
        inside = f"{here}mlp.experts.local_experts.{number}."
        for name, (layout, tensor, shape) in tensors.items():
            stacked = {f"{there}{experts.folder}.{tensor}": (count, *shape)}
            weights[inside + name] = Weight(layout, stacked, of_expert=True, expert=number)
    return weights


def _mlp(
    hidden: int, size: int, here: str, names: tuple[str, ...], *, of_expert: bool = False
) -> dict[str, Weight]:
    """Gate, up and down, by the names of their modules."""
    gate, up, down = (f"{name}.weight" for name in names)
    inner, outer = {gate: (size, hidden), up: (size, hidden)}, {down: (hidden, size)}
    return {
        here + "linear_fc1.weight": Weight("gate_up", inner, of_expert=of_expert),
        here + "linear_fc2.weight": Weight("columns", outer, of_expert=of_expert),
    }
