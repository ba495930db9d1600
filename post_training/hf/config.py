"""Architecture flags from a HuggingFace configuration, so that nobody copies layer counts by hand."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from post_training.errors import SetupError
from post_training.hf.config_values import check_spellings, check_values
from post_training.hf.families import (
    family_of,
    has_qkv_bias,
    head_dim,
    why_not_megatron,
)
from post_training.hf.rotary import check_rotary, rope_parameters, rotary_share

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What older versions of transformers do not compute as config.json says, but for the value here (gpt-oss's
# clamp, the norm of Mamba 2's groups); then the version that was seen to.
_SINCE = {"gpt_oss": ("swiglu_limit", 7.0, "5.19.0"), "mamba2": ("n_groups", 1, "5.23.0")}


# What the table of families reads, if it is there, and some classes of transformers pass over.
_OF_SOME = (
    *("use_sliding_window", "layer_types", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "first_k_dense_replace", "n_group", "topk_group", "no_rope_layers"),
)


def load_hf_config(
    name_or_path: str, *, trust_remote_code: bool = False, backend: str = "megatron"
) -> PretrainedConfig:
    """Read the configuration of a HuggingFace model folder or hub name.

    Args:
        name_or_path: of the model.
        trust_remote_code: its own code may be run.
        backend: what is to compute it: `megatron`, or its own class of `transformers`.

    Raises:
        SetupError: there is no such folder or name, or its architecture cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        written, _ = config.get_config_dict(name_or_path)
    except Exception as error:
        # A validation error has its reason in the lines below.
        detail = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        if Path(name_or_path, "adapter_config.json").is_file():
            reason = (
                "is an adapter of PEFT: train on its base, with it as --lora-adapter; tools answer from it "
                "with --model-backend transformers"
            )
        elif Path(name_or_path).is_dir():
            reason = f"has no config.json that transformers can read ({detail})"
        elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
            reason = "there is no such folder"
        else:
            reason = f"is neither a folder here nor a model that the hub gives ({detail})"
        raise SetupError(f"--hf-model {name_or_path}: {reason}") from error
    check_version(config, name_or_path)
    if backend == "transformers":
        check_causal_lm(config, name_or_path)
        return config
    for key in _OF_SOME:
        if key in vars(config) and not hasattr(type(config), key):
            delattr(config, key)
    check_architecture(config, name_or_path)
    check_spellings(written, config, name_or_path)
    return config


def check_version(config: PretrainedConfig, name: str) -> None:
    """Refuse what the installed transformers computes otherwise than the configuration says.

    Raises:
        SetupError: naming the key, and the version that is needed.
    """
    import transformers
    from packaging.version import Version

    key, usual, since = _SINCE.get(config.model_type, ("", None, "0"))
    if (value := getattr(config, key, usual)) != usual:
        if Version(transformers.__version__) < Version(since):
            raise SetupError(
                f"--hf-model {name}: transformers {transformers.__version__} does not compute {key} "
                f"{value} of {config.model_type} as it is meant; install {since} or newer"
            )


def check_causal_lm(config: PretrainedConfig, name: str) -> None:
    """Refuse what is no causal language model of `transformers`, or has quantised weights.

    Raises:
        SetupError: naming the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if sees(config):
        check_not_quantised(config, name)
        return
    named = getattr(config, "architectures", None)
    found = named[0] if isinstance(named, list) and named else f"{named}"
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    if found not in ((known,) if isinstance(known, str) else known) and (
        own.rpartition(".")[2] != found
    ):
        raise SetupError(
            f"--hf-model {name}: architecture {found} is no causal language model that transformers has"
        )
    check_not_quantised(config, name)


def sees(config: PretrainedConfig) -> bool:
    """Whether config.json is of a model that answers in text to pictures and text (Qwen2.5-VL)."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    named = getattr(config, "architectures", None)
    return isinstance(named, list) and named[:1] == [NAMES.get(config.model_type, ())]


def check_not_quantised(config: PretrainedConfig, name: str) -> None:
    """Refuse a configuration of quantised weights.

    Raises:
        SetupError: naming the method.
    """
    for key in ("quantization_config", "compression_config"):
        if quantisation := getattr(config, key, None):
            method = dict(quantisation).get("quant_method", "method not named")
            raise SetupError(
                f"--hf-model {name}: config.json has {key} ({method}): quantised weights cannot be "
                f"trained; give the model's bf16 weights, with a config.json that says nothing of it"
            )


def check_architecture(config: PretrainedConfig, name: str) -> None:
    """Refuse what the weight mapping or Megatron cannot express.

    Raises:
        SetupError: with the list of architectures that can be loaded, or the option that cannot.
    """
    if reason := why_not_megatron(config):
        cure = "--model-backend transformers computes it by its own class"
        raise SetupError(f"--hf-model {name}: {reason}; {cure}")
    found = (
        config.architectures[0] if isinstance(config.architectures, list) else config.architectures
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, found)
    if by_type != found:
        raise SetupError(
            f"--hf-model {name}: config.json has the model_type {config.model_type} of a {by_type} beside "
            f"the architecture {found}; which of them the weights are is not known"
        )
    check_not_quantised(config, name)
    check_values(config, name)
    if not family_of(config).hybrid:
        check_rotary(config, name)


def sliding_window(config: PretrainedConfig) -> int | None:
    """The sliding attention window the model uses, in tokens, or None."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def window_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's arguments about sliding windows; none where every layer sees whole documents."""
    window, layers = sliding_window(config), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    windowed = [int(kind == "sliding_attention") for kind in kinds]
    if window is None or not family_of(config).windows or not any(windowed):
        return {}
    # Megatron counts the tokens before a query, transformers that one too.
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": windowed}


# Of a task that makes its own model: to Megatron its size is nothing.
NO_MODEL: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 1,
    "ffn_hidden_size": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 1,
    "vocab_size": 1,
    "padded_vocab_size": 1,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
}


def plain_flags(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments that describe to Megatron a model that is not made of its layers.

    They name its size for messages and checks; nothing is built from them. What a configuration does not
    say in one number (heads of a model without attention) is 1.
    """
    text = config.get_text_config()

    def size(key: str, otherwise: int = 1) -> int:
        value = getattr(text, key, None)
        return value if type(value) is int and value > 0 else otherwise

    hidden = size("hidden_size")
    heads = size("num_attention_heads")
    return {
        "num_layers": size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size", 4 * hidden),
        "num_attention_heads": heads if hidden % heads == 0 else 1,
        "max_position_embeddings": size("max_position_embeddings"),
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "vocab_size": size("vocab_size"),
        "padded_vocab_size": size("vocab_size"),
        "untie_embeddings_and_output_weights": not getattr(text, "tie_word_embeddings", False),
    }


def megatron_flags(config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's architecture arguments (by destination name) for a HuggingFace configuration."""
    family = family_of(config)
    if family.hybrid:
        return family.flags(config)
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
        "add_qkv_bias": has_qkv_bias(config),
        "qk_layernorm": family.qk_norm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "init_method_std": config.initializer_range,
        **({"rotary_percent": rotary_share(config)} if family.partial_rotary else {}),
        **window_flags(config),
        **experts,
        **family.flags(config),
    }
