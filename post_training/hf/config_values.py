"""What the numbers of config.json may be: met here, not in a division or a table of frequencies later.

transformers checks some types of some families and no range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from post_training.errors import SetupError
from post_training.hf.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LARGEST = 2**31 - 1
_HUGE = 1e38  # what fp32 holds
# Each layer and each expert has weights of its own, which are listed before they are read.
_MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000, "n_routed_experts": 100_000}
_NEEDED = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ROPE_POSITIVE = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow"),
)
_FACTORS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_values(config: PretrainedConfig, name: str) -> None:
    """Refuse numbers that no model can have.

    Args:
        config: of a known architecture.
        name: of the model, for messages.

    Raises:
        SetupError: naming the key of config.json.
    """
    wrong = next(_wrong_values(config, FAMILIES[config.architectures[0]]), None)
    if wrong is not None:
        key, value, expected = wrong
        raise SetupError(
            f"--hf-model {name}: config.json says {key} {value!r:.60}, expected {expected}"
        )


def check_spellings(written: Mapping[str, Any], config: PretrainedConfig, name: str) -> None:
    """Refuse a config.json whose older spelling contradicts the newer one, which is what is read.

    Args:
        written: what the file says.
        config: what transformers reads in it.
        name: of the model, for messages.

    Raises:
        SetupError: naming the key.
    """
    newer, older = written.get("rope_parameters"), written.get("rope_theta")
    read = newer.get("rope_theta", older) if isinstance(newer, Mapping) else older
    if older is not None and older != read:
        raise SetupError(
            f"--hf-model {name}: config.json says rope_theta {older!r} and, in rope_parameters, {read!r}; "
            f"readers differ in which they take: give one of them, or both alike"
        )
    for key in ("torch_dtype", "dtype"):
        value = written.get(key)
        known = str(value).removeprefix("torch.")
        if value is not None and getattr(torch, known, None) not in _DTYPES:
            raise SetupError(
                f"--hf-model {name}: config.json says {key} {value!r}, expected float32, "
                f"bfloat16 or float16"
            )
    for key in ("hybrid_override_pattern", "num_hidden_layers"):
        # Of Nemotron-H, whose layers_block_type is what counts.
        if (value := written.get(key)) not in (None, found := getattr(config, key, None)):
            raise SetupError(
                f"--hf-model {name}: config.json says {key} {value!r}, and its list of layers {found!r}; "
                f"readers differ in which they take: give one of them, or both alike"
            )
    for one, other in (("num_experts", "num_local_experts"), ("torch_dtype", "dtype")):
        values = [str(written.get(key)).removeprefix("torch.") for key in (one, other)]
        if None not in (written.get(one), written.get(other)) and values[0] != values[1]:
            raise SetupError(
                f"--hf-model {name}: config.json says {one} {written[one]!r} and {other} "
                f"{written[other]!r}; readers differ in which they take: give one, or both alike"
            )


def _wrong_values(config: PretrainedConfig, family: Family) -> Iterator[tuple[str, Any, str]]:
    """Key, value, and what was expected there."""
    value: Any
    if family.hybrid:
        yield from _wrong_hybrid(config)
        return
    needed: tuple[str, ...] = _NEEDED
    if family.experts:
        needed += (family.experts.count, "num_experts_per_tok", family.experts.size)
        needed += ("n_shared_experts",) if family.experts.shared else ()
    for key in (*needed, *(_LATENT if family.latent else ())):
        value, most = getattr(config, key, None), _MOST.get(key, _LARGEST)
        if not _is_size(value) or value > most:
            yield key, value, f"a whole number from 1 to {most}"
    # transformers reads a window whatever its size is, and its use is another key.
    windowed = getattr(config, "use_sliding_window", True)
    for key in ("head_dim", "sliding_window") if windowed else ("head_dim",):
        value = getattr(config, key, None)
        if value is not None and not _is_size(value):
            yield key, value, f"a whole number from 1 to {_LARGEST}, or null"
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds and config.sliding_window is None:
        yield "sliding_window", None, "the window of its layer_types sliding_attention"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        yield "num_attention_heads", heads, f"a multiple of num_key_value_heads {groups}"
    if family.latent:
        yield from _wrong_latent(config)
    if family.experts:
        yield from _wrong_experts(config, getattr(config, family.experts.count))
    layers, without = config.num_hidden_layers, getattr(config, "no_rope_layers", None)
    if without is not None:
        fits = isinstance(without, list) and len(without) >= int(layers or 0)
        if not fits or any(value not in (0, 1) for value in without):
            yield "no_rope_layers", without, f"0 or 1 for each of {layers} layers"
    epsilon: Any = config.rms_norm_eps
    deviation: Any = config.initializer_range
    if not _is_number(epsilon) or not 0 < epsilon <= 1:
        yield "rms_norm_eps", epsilon, "a number above 0 and at most 1"
    if not _is_number(deviation) or not 0 <= deviation <= 1000:
        yield "initializer_range", deviation, "a number from 0 to 1000"
    for key in _FACTORS:
        if not _is_number(value := getattr(config, key, 1.0)) or value <= 0:
            yield key, value, "a number above 0"
    parameters = getattr(config, "rope_parameters", None) or {}
    theta: Any = parameters.get("rope_theta")
    if not _is_number(theta) or not 1 <= theta <= _LARGEST:
        yield "rope_theta", theta, f"a number from 1 to {_LARGEST}"
    for key in _ROPE_POSITIVE if parameters.get("rope_type", "default") != "default" else ():
        value, length = parameters.get(key), key == "original_max_position_embeddings"
        if value is not None and not (
            _is_size(value) if length else _is_number(value) and value > 0
        ):
            what = f"a whole number from 1 to {_LARGEST}" if length else "a number above 0"
            yield f"{key} of its rotary embedding", value, what


def _wrong_hybrid(config: PretrainedConfig) -> Iterator[tuple[str, Any, str]]:
    value: Any
    kinds = set(config.layer_types)
    needed = ["hidden_size", "vocab_size", "head_dim", "n_groups", "conv_kernel", "chunk_size"]
    alone = config.model_type == "mamba2"
    heads = "num_heads" if alone else "mamba_num_heads"
    needed += [heads, "state_size"] if alone else [heads, "mamba_head_dim", "ssm_state_size"]
    if "full_attention" in kinds:
        needed += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    if "mlp" in kinds:
        needed += ["intermediate_size"]
    if "moe" in kinds:
        needed += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"]
        needed += ["moe_shared_expert_intermediate_size"]
    for key in needed:
        value, most = getattr(config, key, None), _MOST.get(key, _LARGEST)
        if not _is_size(value) or value > most:
            yield key, value, f"a whole number from 1 to {most}"
    if "linear_attention" not in kinds:
        yield "layer_types", sorted(kinds), "a state-space layer among them"
    for many, few in ((heads, "n_groups"), ("num_attention_heads", "num_key_value_heads")):
        if few in needed and getattr(config, many) % getattr(config, few):
            yield many, getattr(config, many), f"a multiple of {few} {getattr(config, few)}"
    if "moe" in kinds and not 1 < config.num_experts_per_tok <= config.n_routed_experts:
        there = f"from 2 to the {config.n_routed_experts} experts that there are"
        yield "num_experts_per_tok", config.num_experts_per_tok, there
    limits = config.time_step_limit if alone else (0, 1)
    if len(limits) != 2 or not all(_is_number(v) or v == math.inf for v in limits):
        yield "time_step_limit", limits, "two numbers"
    ranges = [("layer_norm_epsilon", 0, 1.0), ("initializer_range", -1, 1000.0)]
    # Megatron passes over a factor of 0.
    ranges += [("routed_scaling_factor", 0, _HUGE)] if "moe" in kinds else []
    for key, low, high in ranges:
        value = getattr(config, key)
        if not _is_number(value) or not low < value <= high:
            yield key, value, f"a number above {low} and at most {high}"


def _wrong_latent(config: PretrainedConfig) -> Iterator[tuple[str, Any, str]]:
    low, rotary, heads = config.q_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    if low is not None and not _is_size(low):
        yield "q_lora_rank", low, f"a whole number from 1 to {_LARGEST}, or null"
    rope = config.rope_parameters
    scaled = rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim")
    for key in ("mscale_all_dim", "factor") if scaled else ():
        if not _is_number(rope.get(key)):
            yield f"{key} of its rotary embedding", rope.get(key), "a number"
    if rotary % 2:
        yield "qk_rope_head_dim", rotary, "an even number"
    if config.head_dim != rotary:  # transformers turns as many numbers as it says
        yield "head_dim", config.head_dim, f"qk_rope_head_dim {rotary}"
    if config.num_key_value_heads != heads:
        yield "num_key_value_heads", config.num_key_value_heads, f"num_attention_heads {heads}"


def _wrong_groups(config: PretrainedConfig, experts: int) -> Iterator[tuple[str, Any, str]]:
    """Groups of experts, of which Megatron takes as many for a group's score as it then chooses in one."""
    groups, chosen, of_groups = config.n_group, config.num_experts_per_tok, config.topk_group
    scale, first = config.routed_scaling_factor, config.first_k_dense_replace
    # transformers scores a group by its best two experts.
    if not _is_size(groups) or experts % groups or experts < 2 * groups:
        yield "n_group", groups, f"groups of 2 or more, all alike, of the {experts} experts"
    elif not _is_size(of_groups) or of_groups > groups:
        yield "topk_group", of_groups, f"from 1 to the {groups} groups that there are"
    elif of_groups < groups and chosen != 2 * of_groups:
        yield (
            "num_experts_per_tok",
            chosen,
            f"2 for each of topk_group {of_groups} (only this is known)",
        )
    if chosen == 1:
        yield "num_experts_per_tok", chosen, "more than 1, whose weights add up to 1"
    if not _is_number(scale) or scale <= 0:
        yield "routed_scaling_factor", scale, "a number above 0"
    if not _is_index(first):
        yield "first_k_dense_replace", first, "a number of layers"


def _wrong_experts(config: PretrainedConfig, experts: int) -> Iterator[tuple[str, Any, str]]:
    chosen = config.num_experts_per_tok
    if hasattr(config, "n_group"):
        yield from _wrong_groups(config, experts)
    if chosen > experts:
        yield "num_experts_per_tok", chosen, f"at most the {experts} experts that there are"
    step = getattr(config, "decoder_sparse_step", 1)
    if not _is_size(step):
        yield "decoder_sparse_step", step, "a whole number from 1"
    dense = getattr(config, "mlp_only_layers", None)
    if dense is not None and not (isinstance(dense, (list, tuple)) and all(map(_is_index, dense))):
        yield "mlp_only_layers", dense, "a list of layers"


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_size(value: object) -> bool:
    return _is_index(value) and value != 0


def _is_number(value: object) -> bool:
    # Of an integer of any size, and false for nan.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE
