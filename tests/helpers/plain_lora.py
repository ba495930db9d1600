"""Low-rank factors in a HuggingFace model: peft's own, and plain sums beside fused experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.utils import parametrize

from post_training.adapters.layers import new_factors
from post_training.adapters.settings import LoraSettings, Target, chosen_targets

SEED = 1234


class _Experts(torch.nn.Module):
    """Adds the products of the factors of every expert to a fused parameter: [experts, rows, columns]."""

    def __init__(self, parts: list[list[Target]], factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.parts, self.factors_by_key = parts, factors

    def forward(self, weight: Tensor) -> Tensor:
        changes = []
        for expert in self.parts:
            ab = [[self.factors_by_key[key] for key in target.keys] for target in expert]
            products = [t.scaling * b @ a for t, (a, b) in zip(expert, ab, strict=True)]
            changes.append(torch.cat(products))
        return weight + torch.stack(changes)


def adapt(model: Any, settings: LoraSettings) -> dict[str, Tensor]:
    """Freeze a model, add factors that begin as ours do, and return them under PEFT's names."""
    targets = chosen_targets(model.config, settings)
    experts = [t for t in targets.values() if t.weight.of_expert]
    others = [t for t in targets.values() if not t.weight.of_expert]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, Tensor] = {}
    if others:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(settings.alpha),
            use_rslora=settings.rslora,
            target_modules=[t.name for t in others],
        )
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[name.replace(".default", "")] = parameter
    for target in experts:
        for key, value in zip(target.keys, new_factors(target, SEED), strict=True):
            found[key] = torch.nn.Parameter(value)
    for name in dict.fromkeys(t.name.rpartition(".experts.")[0] for t in experts):
        module = model.get_submodule(f"{name}.experts")
        here = [t for t in experts if t.name.startswith(f"{name}.experts.")]
        numbers = dict.fromkeys(t.name.split(".")[-2] for t in here)
        for parameter, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            fused = [[targets[f"{name}.experts.{n}.{p}"] for p in parts] for n in numbers]
            parametrize.register_parametrization(module, parameter, _Experts(fused, found))
    with torch.no_grad():
        for target in others:
            for key, value in zip(target.keys, new_factors(target, SEED), strict=True):
                found[key].copy_(value)
    return found


def factors_in(run: Path) -> dict[str, Tensor]:
    """The factors of the newest checkpoint of a run, by PEFT's names, whatever layout wrote it."""
    folder = max((run / "checkpoints").glob("iter_*"))
    reader = FileSystemReader(folder)
    state: dict[str, Any] = {
        key: torch.empty(value.size)
        for key, value in reader.read_metadata().state_dict_metadata.items()
        if key.startswith("adapter.") and isinstance(value, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix("adapter."): value for key, value in state.items()}
