"""Factors in a model of `transformers`, by `peft`: put in, filled, found again and merged.

`inject_adapter_in_model` keeps the model's class and its signature. Every new factor is made whole from its
matrix's name, and each rank keeps its rows: the start is the same on any number of processes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from post_training.adapters.layers import new_factors
from post_training.adapters.modules import modules_of
from post_training.adapters.nf4 import NF4Linear
from post_training.adapters.peft_config import WEIGHTS
from post_training.adapters.peft_folder import PREFIX
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.errors import SetupError
from post_training.hf.causal_lm import fill

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAME = ".default"
"""What `peft` calls an adapter that nobody named."""


def _use_nf4(model: Any, config: PretrainedConfig) -> None:
    for name, module in modules_of(config).items():
        if module.kind in ("attention", "mlp"):
            model.set_submodule(name, NF4Linear(model.get_submodule(name)))


@torch.no_grad()
def round_to_nf4(model: Any, config: PretrainedConfig) -> None:
    """Give a plain model the weights that its 4 bits stand for."""
    weights = {name: model.get_submodule(name).weight for name in modules_of(config)}
    _use_nf4(model, config)
    for name, module in _nf4_layers(model):
        module.weight_nf4.copy_(module.pack(weights[name]))
        model.set_submodule(name, module.whole())


def _nf4_layers(model: Any) -> list[tuple[str, NF4Linear]]:
    return [(n, module) for n, module in model.named_modules() if isinstance(module, NF4Linear)]


def inject(model: Any, config: PretrainedConfig, settings: LoraSettings, dropout: float) -> None:
    """Freeze a model without memory and put factors of fp32 into it, without memory too.

    Raises:
        SetupError: peft refuses a target.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = chosen_targets(config, settings)
    if settings.nf4:
        _use_nf4(model, config)
    theirs = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=settings.rslora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        target_modules=[name for name, target in targets.items() if not target.fused],
        target_parameters=[name for name, target in targets.items() if target.fused],
    )
    packed = _nf4_layers(model)
    for _, layer in packed:
        layer.weight = layer.weight_nf4  # peft looks at it, for its device
    # Names are those of the modules here. Where peft sees the configuration of a model with experts, it
    # takes some for those of transformers 4, and dense layers' for experts'.
    around = torch.nn.Module()
    around.model = model
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(theirs, around)
    except ValueError as error:
        raise SetupError(f"--lora-targets: peft refuses them: {error}") from error
    for _, layer in packed:
        layer.register_parameter("weight", None)
    found = factors_of(model)
    wrong = found.keys() ^ {key for target in targets.values() for key in target.keys}
    if wrong:
        raise SetupError(f"--lora-targets: peft has put in other factors, such as {min(wrong)}")


def factors_of(model: Any) -> dict[str, Tensor]:
    """The factors of a model, under PEFT's names."""
    return {
        name.replace(_NAME, ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def fill_factors(
    model: Any, config: PretrainedConfig, settings: LoraSettings, seed: int, folder: str | None
) -> None:
    """Give factors their first values.

    Args:
        model: sharded or whole, with memory.
        config: of the model.
        settings: of the adapter.
        seed: of new ones.
        folder: an adapter of PEFT that is continued instead.
    """
    found = factors_of(model)
    if folder is not None:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            for key, factor in found.items():
                fill(factor, file.get_slice(PREFIX + key), key)
        return
    for target in chosen_targets(config, settings).values():
        for key, value in zip(target.keys, new_factors(target, seed), strict=True):
            fill(found[key], value, key)


@torch.no_grad()
def merge_factors(model: Any, *, rounded: bool = True) -> None:
    """Turn a whole model with factors into one without that computes the same.

    Args:
        model: with its memory; used up.
        rounded: sums, made in fp32, are turned to what the matrices were of; else they stay.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in _nf4_layers(model):
        model.set_submodule(name, module.whole())
    # Of parts around each other the inner ones first.
    every = reversed(list(model.named_modules()))
    for name, layer in [(n, m) for n, m in every if isinstance(m, LoraLayer)]:
        own = list(layer.base_layer.parameters())
        dtypes = [parameter.dtype for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()
        layer.merge()
        for parameter, dtype in zip(own, dtypes if rounded else (), strict=rounded):
            parameter.data = parameter.data.to(dtype)
        model.set_submodule(name, layer.base_layer)
