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

Layout = Literal["replicated", "vocabulary", "qkv", "gate_up", "columns"]
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


@dataclass(frozen=True)
class Experts:
    """What the experts of a family are called, below `model.layers.N.` and in config.json."""

    router: str = "mlp.gate.weight"
    folder: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down."""
    size: str = "moe_intermediate_size"
    """The key of config.json that holds an expert's width."""

    def flags(self, config: PretrainedConfig) -> dict[str, Any]:
        """Megatron's arguments about experts."""
        return {
            "num_experts": config.num_experts,
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
        return [
            int(layer not in dense and (layer + 1) % step == 0)
            for layer in range(config.num_hidden_layers)
        ]


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama."""

    qkv_bias: bool = False
    """Queries, keys and values have a bias; their output has none."""
    qk_norm: bool = False
    """Each head of the queries and keys is normed."""
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


FAMILIES: Mapping[str, Family] = {
    "Ernie4_5ForCausalLM": Family(
        options={"use_bias": (False,)}, flags=lambda config: {"rotary_interleaved": True}
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
        weights |= _attention(config, family, here, there)
        if family.experts and has_experts:
            weights |= _experts(config, family.experts, here, there)
        else:
            names = tuple(f"{there}mlp.{part}_proj" for part in ("gate", "up", "down"))
            weights |= _mlp(config.hidden_size, config.intermediate_size, here + "mlp.", names)
    return weights


def _attention(
    config: PretrainedConfig, family: Family, here: str, there: str
) -> dict[str, Weight]:
    """Both norms of a layer, and its attention."""
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

    weights = {
        here + "input_layernorm.weight": norm(there + "input_layernorm", hidden),
        here + "pre_mlp_layernorm.weight": norm(there + "post_attention_layernorm", hidden),
        inside + "linear_qkv.weight": qkv("weight", hidden),
        inside + "linear_proj.weight": Weight(
            "columns", {outside + "o_proj.weight": (hidden, queries)}
        ),
    }
    if family.qkv_bias:
        weights[inside + "linear_qkv.bias"] = qkv("bias")
    if family.qk_norm:
        for part in ("q", "k"):
            weights[f"{inside}{part}_layernorm.weight"] = norm(f"{outside}{part}_norm", head)
    return weights


def _experts(
    config: PretrainedConfig, experts: Experts, here: str, there: str
) -> dict[str, Weight]:
    """Router and experts of a layer."""
    router = {there + experts.router: (config.num_experts, config.hidden_size)}
    weights = {here + "mlp.router.weight": Weight("replicated", router)}
    for number in range(config.num_experts):
        names = tuple(f"{there}{experts.folder}.{number}.{part}" for part in experts.projections)
        inside = f"{here}mlp.experts.local_experts.{number}."
        size = getattr(config, experts.size)
        weights |= _mlp(config.hidden_size, size, inside, names, of_expert=True)
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
