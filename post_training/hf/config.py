"""Architecture flags from a HuggingFace configuration, so that nobody copies layer counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from post_training.errors import SetupError
from post_training.hf.families import FAMILIES, OPTIONS, ROPE_TYPES, family_of, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_hf_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration of a HuggingFace model folder or hub name.

    Raises:
        SetupError: there is no such folder or name, or its architecture cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(name_or_path).is_dir():
            reason = f"has no config.json that transformers can read ({detail})"
        elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
            reason = "there is no such folder"
        else:
            reason = f"is neither a folder here nor a model that the hub gives ({detail})"
        raise SetupError(f"--hf-model {name_or_path}: {reason}") from error
    check_architecture(config, name_or_path)
    return config


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Refuse what the weight mapping or Megatron cannot express.

    Raises:
        SetupError: with the list of architectures that can be loaded, or the option that cannot.
    """
    found = (getattr(config, "architectures", None) or ["(none named)"])[0]
    if found not in FAMILIES:
        raise SetupError(
            f"--hf-model {name}: architecture {found} cannot be loaded; "
            f"these can: {', '.join(FAMILIES)}"
        )
    for key in ("quantization_config", "compression_config"):
        if quantisation := getattr(config, key, None):
            method = dict(quantisation).get("quant_method", "method not named")
            raise SetupError(
                f"--hf-model {name}: config.json has {key} ({method}): quantised weights cannot be "
                f"trained; give the model's bf16 weights, with a config.json that says nothing of it"
            )
    for key, values in {**OPTIONS, **FAMILIES[found].options}.items():
        value = getattr(config, key, values[0])
        if value not in values:
            raise SetupError(
                f"--hf-model {name}: {key} {value} is not supported for {found}; "
                f"only {' and '.join(map(str, values))}"
            )
    rope_type = rope_parameters(config).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise SetupError(
            f"--hf-model {name}: rope type {rope_type} is not supported; "
            f"these are: {', '.join(ROPE_TYPES)}"
        )
    if rope_parameters(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise SetupError(f"--hf-model {name}: partial rotary embeddings are not supported")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary parameters of a configuration (transformers 5 keeps them in one dictionary)."""
    return dict(getattr(config, "rope_parameters", None) or {})


def inverse_frequencies(config: PretrainedConfig) -> torch.Tensor:
    """Inverse frequencies of the rotary embedding, as `transformers` computes them.

    Returns:
        float32 [head_dim / 2].
    """
    rope_type = rope_parameters(config).get("rope_type", "default")
    if rope_type == "default":
        dim = head_dim(config)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
        return 1.0 / (float(rope_parameters(config)["rope_theta"]) ** exponents)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    assert scaling == 1.0, "checked by ROPE_TYPES"
    return frequencies.to(torch.float32)


def sliding_window(config: PretrainedConfig) -> int | None:
    """The sliding attention window the model uses, in tokens, or None."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def megatron_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's architecture arguments (by destination name) for a HuggingFace configuration."""
    family = family_of(config)
    experts = family.experts.flags(config) if family.experts else {}
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_dim(config),
        "max_position_embeddings": config.max_position_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope",
        "rotary_base": int(rope_parameters(config)["rope_theta"]),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "init_method_std": config.initializer_range,
        **experts,
        **family.flags(config),
    }
