"""Low-rank factors in a HuggingFace model: peft's own where it is installed, else sums beside the weights.

Experts, which transformers fuses, have such sums in any case.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import AutoConfig

from post_training.adapters.injected import round_to_nf4
from post_training.adapters.layers import new_factors
from post_training.adapters.settings import LoraSettings, Target, chosen_targets
from tests.helpers.checkpoint import tensors

SEED = 1234
HAS_PEFT = importlib.util.find_spec("peft") is not None


class _Sum(torch.nn.Module):
    """A weight plus products of factors: of one matrix, or of the parts of each expert, stacked."""

    def __init__(self, parts: list[list[Target]], factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.parts, self.by_key = parts, factors

    def forward(self, weight: Tensor) -> Tensor:
        changes = []
        for parts in self.parts:
            ab = [[self.by_key[key] for key in target.keys] for target in parts]
            each = [t.scaling * b @ a for t, (a, b) in zip(parts, ab, strict=True)]
            changes.append(each[0].t() if parts[0].is_embedding else torch.cat(each))
        return weight + (torch.stack(changes) if weight.dim() == 3 else changes[0])


def adapt(model: Any, settings: LoraSettings, peft: bool = HAS_PEFT) -> dict[str, Tensor]:
    """Freeze a model, add factors that begin as ours do, and return them under PEFT's names.

    Of a base in 4 bits, beside the weights that these stand for.
    """
    if settings.nf4:
        round_to_nf4(model, model.config)
    targets = chosen_targets(model.config, settings)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # It takes dense layers beside fused experts for these.
    some = any(t.fused for t in targets.values())
    theirs = [t for t in targets.values() if t.fused or t.kind != "mlp" or not some]
    by_peft = [t for t in theirs if peft and not t.weight.of_expert]
    found: dict[str, Tensor] = {}
    if by_peft:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(settings.alpha),
            use_rslora=settings.rslora,
            target_modules=[t.name for t in by_peft if not t.fused],
            target_parameters=[t.name for t in by_peft if t.fused],
        )
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[name.replace(".default", "")] = parameter
    sums: dict[tuple[str, str], list[list[Target]]] = {}
    for name, target in targets.items():
        values = dict(zip(target.keys, new_factors(target, SEED), strict=True))
        with torch.no_grad():
            for key, value in values.items():
                if target in by_peft:
                    found[key].copy_(value)
                else:
                    found[key] = torch.nn.Parameter(value)
        module, _, part = name.rpartition(".")
        if target.weight.of_expert:
            fused = "down_proj" if part == "down_proj" else "gate_up_proj"
            experts = sums.setdefault((module.rpartition(".")[0], fused), [])
            if part == "up_proj":
                experts[-1].append(target)
            else:
                experts.append([target])
        elif target not in by_peft:
            sums[name, "weight"] = [[target]]
    for (name, parameter), parts in sums.items():
        module = model.get_submodule(name)
        parametrize.register_parametrization(module, parameter, _Sum(parts, found))
    return found


def _names_under_fsdp2(run: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """PEFT's names of what FSDP2 saves of factors beside Megatron's layers, by the name of their module."""
    folder = yaml.safe_load((run / "config.yaml").read_text())["hf_model"]
    settings = LoraSettings.of(manifest["origin"]["lora"])
    beside: dict[str, list[Target]] = {}
    for target in chosen_targets(AutoConfig.from_pretrained(folder), settings).values():
        beside.setdefault(target.parameter.removesuffix(".weight"), []).append(target)
    return {
        f"model.{layer}.adapter.factors.{number}.{name}": key
        for layer, targets in beside.items()
        for number, target in enumerate(sorted(targets, key=lambda each: each.part))
        for name, key in zip(("lora_a", "lora_b"), target.keys, strict=True)
    }


def factors_in(run: Path) -> dict[str, Tensor]:
    """The factors of the newest checkpoint of a run, by PEFT's names, whatever layout wrote it."""
    checkpoint = max((run / "checkpoints").glob("iter_*[0-9]"))
    every = tensors(checkpoint)
    if any(".factors." in key for key in every):
        names = _names_under_fsdp2(run, json.loads((checkpoint / "manifest.json").read_text()))
        return {names[key]: value for key, value in every.items() if key in names}
    return {
        key.removeprefix("model.model.").removeprefix("adapter.").replace(".default", ""): value
        for key, value in every.items()
        if key.startswith(("adapter.", "model.model."))
    }
