"""Models with state-space layers: Nemotron-H, and Mamba 2 alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.tensors.weight import Layout, Weight, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Megatron's letter of each kind of layer in config.json.
SYMBOLS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}

NEMOTRON_H: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),  # transformers does not tie them, whatever is said
    "moe_latent_size": (None,),
    "num_nextn_predict_layers": (0,),
    "n_group": (1,),
    "topk_group": (1,),
    "norm_topk_prob": (True,),
}
MAMBA_2: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}


@dataclass(frozen=True)
class StateSpace:
    """The state-space layers of a model."""

    heads: int
    head_dim: int
    groups: int
    """Heads of a group share B and C, and are normed together."""
    state: int
    kernel: int
    """Tokens that the convolution sees."""
    epsilon: float
    step_limit: tuple[float, float]
    """Between which the steps are held."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> StateSpace:
        """Read it from a configuration of either family."""
        if config.model_type == "mamba2":
            return cls(
                config.num_heads,
                config.head_dim,
                config.n_groups,
                config.state_size,
                config.conv_kernel,
                config.layer_norm_epsilon,
                (float(config.time_step_limit[0]), float(config.time_step_limit[1])),
            )
        return cls(
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.n_groups,
            config.ssm_state_size,
            config.conv_kernel,
            config.layer_norm_epsilon,
            # As transformers, which does not look at time_step_limit here.
            (float(config.time_step_min), float("inf")),
        )

    @property
    def inner(self) -> int:
        """Width of what the heads give together."""
        return self.heads * self.head_dim


def pattern(config: PretrainedConfig) -> str:
    """The layers of a model, a letter each."""
    return "".join(SYMBOLS[kind] for kind in config.layer_types)


def hybrid_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's architecture arguments of a model with state-space layers."""
    space, letters = StateSpace.of(config), pattern(config)
    flags: dict[str, Any] = {
        "hybrid_layer_pattern": letters,
        "num_layers": len(letters),
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": getattr(config, "intermediate_size", config.hidden_size),
        # Without attention, what is split by heads are these.
        "num_attention_heads": config.num_attention_heads if "*" in letters else space.heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": getattr(config, "max_position_embeddings", 2**20),
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "none",
        "swiglu": False,
        "squared_relu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "init_method_std": config.initializer_range,
        "mamba_num_heads": space.heads,
        "mamba_head_dim": space.head_dim,
        "mamba_num_groups": space.groups,
        "mamba_state_dim": space.state,
    }
    if "*" in letters:
        flags |= {"group_query_attention": True, "num_query_groups": config.num_key_value_heads}
    if "E" in letters:
        flags |= {
            "num_experts": config.n_routed_experts,
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "moe_router_topk_scaling_factor": config.routed_scaling_factor,
            "moe_router_dtype": "fp32",
        }
    return flags


def hybrid_weights(config: PretrainedConfig) -> Weights:
    """All that a model with state-space layers is made of, as `families.model_weights`."""
    hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    weights = {
        "embedding.word_embeddings.weight": Weight(
            "vocabulary", {"backbone.embeddings.weight": vocabulary}
        ),
        "decoder.final_norm.weight": Weight("replicated", {"backbone.norm_f.weight": (hidden,)}),
    }
    if not config.tie_word_embeddings:
        weights["output_layer.weight"] = Weight("vocabulary", {"lm_head.weight": vocabulary})
    norms = {"M": "norm", "*": "input_layernorm", "-": "pre_mlp_layernorm"}
    parts = {"M": _mixer, "*": _attention, "-": _mlp, "E": _experts}
    for layer, letter in enumerate(pattern(config)):
        here, there = f"decoder.layers.{layer}.", f"backbone.layers.{layer}."
        norm = f"{here}{norms.get(letter, 'pre_mlp_layernorm')}.weight"
        weights[norm] = Weight("replicated", {f"{there}norm.weight": (hidden,)})
        weights |= parts[letter](config, here, there + "mixer.")
    return weights


def _mixer(config: PretrainedConfig, here: str, there: str) -> Weights:
    space, hidden, own = StateSpace.of(config), config.hidden_size, here + "mixer."
    shared = space.groups * space.state
    convolved = (space.inner, shared, shared)
    rows, every = sum(convolved), (space.inner, *convolved, space.heads)
    projection = {there + "in_proj.weight": (sum(every), hidden)}
    weights = {
        own + "in_proj.weight": Weight("rows", projection, sections=every),
        own + "conv1d_weight": Weight(
            "rows", {there + "conv1d.weight": (rows, 1, space.kernel)}, sections=convolved
        ),
        own + "conv1d_bias": Weight("rows", {there + "conv1d.bias": (rows,)}, sections=convolved),
        own + "norm.weight": Weight("rows", {there + "norm.weight": (space.inner,)}),
        own + "out_proj.weight": Weight(
            "columns", {there + "out_proj.weight": (hidden, space.inner)}
        ),
    }
    for name in ("A_log", "D", "dt_bias"):
        weights[own + name] = Weight("rows", {there + name: (space.heads,)})
    return weights


def _attention(config: PretrainedConfig, here: str, there: str) -> Weights:
    hidden, head, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    queries, own = config.num_attention_heads * head, here + "self_attention."
    rows = {"q_proj": queries, "k_proj": groups * head, "v_proj": groups * head}
    qkv = {f"{there}{name}.weight": (size, hidden) for name, size in rows.items()}
    return {
        own + "linear_qkv.weight": Weight("qkv", qkv, groups),
        own + "linear_proj.weight": Weight("columns", {there + "o_proj.weight": (hidden, queries)}),
    }


def _up_down(hidden: int, size: int, here: str, there: str, of_expert: bool = False) -> Weights:
    names: dict[str, tuple[Layout, str, tuple[int, int]]] = {
        "linear_fc1": ("rows", "up_proj", (size, hidden)),
        "linear_fc2": ("columns", "down_proj", (hidden, size)),
    }
    return {
        f"{here}{name}.weight": Weight(
            layout, {f"{there}{tensor}.weight": shape}, of_expert=of_expert
        )
        for name, (layout, tensor, shape) in names.items()
    }


def _mlp(config: PretrainedConfig, here: str, there: str) -> Weights:
    return _up_down(config.hidden_size, config.intermediate_size, here + "mlp.", there)


def _experts(config: PretrainedConfig, here: str, there: str) -> Weights:
    hidden, count, own = config.hidden_size, config.n_routed_experts, here + "mlp."
    shared = config.moe_shared_expert_intermediate_size
    bias = {there + "gate.e_score_correction_bias": (count,)}
    weights = {
        own + "router.weight": Weight("replicated", {there + "gate.weight": (count, hidden)}),
        own + "router.expert_bias": Weight("replicated", bias),
        **_up_down(hidden, shared, own + "shared_experts.", there + "shared_experts."),
    }
    for number in range(count):
        inside, outside = f"{own}experts.local_experts.{number}.", f"{there}experts.{number}."
        weights |= _up_down(hidden, config.moe_intermediate_size, inside, outside, of_expert=True)
    return weights
