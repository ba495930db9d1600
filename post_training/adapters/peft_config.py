"""What PEFT's `adapter_config.json` may say: what is read, what is refused by name, what has no effect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from post_training.adapters.settings import Target
from post_training.errors import SetupError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# All that the configuration may say. What is read, and what it must be; None is as if it were not there.
_READ: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("LORA: only LoRA can be trained on", lambda v: v == "LORA"),
    "r": ("a whole number from 1", lambda v: _is_rank(v)),
    "lora_alpha": ("a number above 0", lambda v: _is_alpha(v)),
    "use_rslora": ("true or false", lambda v: v is None or isinstance(v, bool)),
    "rank_pattern": ("whole numbers by patterns", lambda v: _are_patterns(v, _is_rank)),
    "alpha_pattern": ("numbers by patterns", lambda v: _are_patterns(v, _is_alpha)),
    "target_modules": ("names, or one pattern", lambda v: _is_pattern(v) or _are_names(v)),
    "exclude_modules": ("names, or one pattern", lambda v: _is_pattern(v) or _are_names(v)),
    "layers_to_transform": ("whole numbers", lambda v: _are_layers(v)),
    "layers_pattern": ("names", lambda v: v is None or isinstance(v, str) or _are_names(v)),
    "target_parameters": ("names", lambda v: v is None or _are_names(v)),
    "bias": ("none: trained biases are not read", lambda v: v in (None, "none")),
    # The others, as pissa, olora or loftq, take from the base what they put into the factors.
    "init_lora_weights": (
        "true, or a start that leaves the base as it is",
        lambda v: v is None or isinstance(v, bool) or v in ("gaussian", "eva", "orthogonal"),
    ),
}
_NEEDED = ("peft_type", "r", "lora_alpha")
# What has no effect on an adapter that is there: notes, and how factors began or are trained.
_WITHOUT_EFFECT = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout "
    "megatron_config megatron_core runtime_config eva_config corda_config lora_ga_config "
    "qalora_group_size ensure_weight_tying".split()
)
# What computes something else than W + scaling * B A, or trains more. An entry that is in none of these
# tables, as a later PEFT may write, is refused too, where it is set.
_OTHER = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA",
    "lora_bias": "factors with a bias",
    "modules_to_save": "modules trained as a whole",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "factors of fused parameters",
    "layer_replication": "replicated layers",
    "fan_in_fan_out": "transposed weights",
    "loftq_config": "LoftQ, whose base is another",
}
# There they are what `peft` trains.
_OF_TRANSFORMERS = ("target_parameters", "fan_in_fan_out")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**24


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**24


def _is_pattern(value: Any) -> bool:
    try:
        return value is None or bool(re.compile(value))
    except (TypeError, OverflowError, RecursionError, re.error):
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_patterns(value: Any, of: Callable[[Any], bool]) -> bool:
    mapping = value is None or isinstance(value, dict)
    return mapping and all(_is_pattern(k) and of(v) for k, v in (value or {}).items())


def _are_layers(value: Any) -> bool:
    return value is None or all(
        type(each) is int for each in (value if isinstance(value, list) else [value])
    )


def check_config(found: Mapping[str, Any], where: str, backend: str) -> None:
    """Refuse an adapter that is no plain LoRA, or whose configuration cannot be meant.

    Raises:
        SetupError: naming the entry.
    """
    for key in _NEEDED:
        if found.get(key) is None:
            raise SetupError(f"{where}: {CONFIG} has no {key}; name a LoRA adapter of PEFT")
    for key, value in found.items():
        set_ = value not in (None, False, [], {}, "")
        plain = backend == "transformers" and key in _OF_TRANSFORMERS
        if key == "target_parameters" and _are_names(value):
            # The weight of a module is its matrix.
            plain = plain or all(name.endswith(".weight") for name in value)
        if key in _OTHER and set_ and not plain:
            raise SetupError(
                f"{where}: {key} is set ({_OTHER[key]}); only plain LoRA can be trained on"
            )
        what, fits = _READ.get(key, ("", None))
        if fits is not None and not fits(value):
            shown = json.dumps(value)
            shown = shown if len(shown) < 40 else f"{shown[:36]}..."
            raise SetupError(f"{where}: {key} is {shown} in {CONFIG}; it must be {what}")
        if set_ and key not in _READ.keys() | _OTHER.keys() | _WITHOUT_EFFECT:
            raise SetupError(
                f"{where}: {CONFIG} says {key}, which is not known here and may compute something else "
                f"than plain LoRA; take it out if it does not"
            )


def is_meant(found: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT puts factors beside a module (its `check_target_module_exists`)."""

    def named(words: str | list[str] | None) -> bool:
        if isinstance(words, str):
            return re.fullmatch(words, name) is not None
        return any(f".{name}".endswith(f".{word}") for word in words or ())

    wanted, layers = found.get("target_modules"), found.get("layers_to_transform")
    if not named(wanted) or named(found.get("exclude_modules") or None):
        return False
    if isinstance(wanted, str) or layers is None or layers == []:
        return True
    patterns = found.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if number := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(number[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def check_names(
    found: Mapping[str, Any], every: Mapping[str, Target], names: Collection[str], where: str
) -> None:
    """Refuse a configuration that means other modules than those whose factors are stored.

    PEFT itself would begin new factors, or leave stored ones out, with a warning at most.

    Raises:
        SetupError: naming a module.
    """
    if found.get("target_modules") == "all-linear":  # which PEFT stores as names
        return
    for key in ("target_modules", "target_parameters"):
        words = found.get(key) or []
        for word in [] if isinstance(words, str) else words:
            if not any(f".{name}".endswith(f".{word.removesuffix('.weight')}") for name in every):
                raise SetupError(f"{where}: {CONFIG} names {word}, which --hf-model does not have")
    # Fused in transformers, experts are no modules that PEFT looks at.
    experts = any(every[name].weight.of_expert for name in names)
    modules = {n for n, t in every.items() if not t.fused and (experts or not t.weight.of_expert)}
    weights = tuple(f".{name}" for name in found.get("target_parameters") or ())
    meant = {n for n in modules if is_meant(found, n) or f".{n}.weight".endswith(weights)}
    for name in sorted(meant - set(names)):
        raise SetupError(f"{where}: {CONFIG} means {name}, of which {WEIGHTS} holds no factors")
    for name in sorted(modules & set(names) - meant):
        raise SetupError(
            f"{where}: {WEIGHTS} holds factors of {name}, which {CONFIG} does not mean"
        )
