"""An adapter as PEFT stores it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from post_training.adapters.peft_config import CONFIG, WEIGHTS, check_config, check_names
from post_training.adapters.settings import (
    LoraSettings,
    Target,
    chosen_targets,
    every_target,
    short_names,
)
from post_training.errors import SetupError
from post_training.files import json_object, let_all_read
from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.folder import local_model_folder, weights_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "base_model.model."
# In the header of the weights: which base they belong to (`hf/folder.py`).
BASE = "base_weights"
# What peft may take for matrices of single experts (its transformers_weight_conversion.py).
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_DTYPES = ("F64", "F32", "BF16", "F16")


def read_settings(
    folder: str | Path,
    config: PretrainedConfig,
    base: Path,
    *,
    backend: str = "megatron",
    nf4: bool = False,
) -> LoraSettings:
    """What a stored adapter is; its tensors are looked at, and not kept.

    Args:
        folder: PEFT's.
        config: of the base.
        base: its folder.
        backend: what computes the base.
        nf4: whether that is kept in 4 bits.

    Raises:
        SetupError: there is none, it is no plain LoRA, or it does not fit the model.
    """
    where = f"--lora-adapter {folder}"
    if not (Path(folder) / CONFIG).is_file():
        raise SetupError(
            f"{where}: holds no {CONFIG}; name a folder that PEFT or this project wrote"
        )
    found = json_object(Path(folder) / CONFIG)
    check_config(found, where, backend)
    every = every_target(config, backend)
    stored = shapes_of(folder, where)
    fused = tuple(f".{name}" for name in found.get("target_parameters") or ())
    names: set[str] = set()
    for key in list(stored):
        kept = every.get(re.sub(r"(\.base_layer)?\.weight$", "", key))
        if kept is not None and kept.kind in ("embedding", "output", "tied"):
            # PEFT stores a copy of an embedding that has factors, or that was made larger.
            if not _same_rows(folder, key, base, f"{kept.name}.weight"):
                raise SetupError(
                    f"{where}: its {key} is not that of --hf-model: it is another base's"
                )
            del stored[key]
            continue
        name = re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", "", key)
        above = f"{name.replace('.base_layer', '')}."
        meant = [
            n
            for n, t in every.items()
            if t.fused and n.startswith(above) and f".{n}".endswith(fused)
        ]
        if name in every:
            meant = [name]
        if not meant or name == key:
            single = backend == "transformers" and re.search(r"\.experts\.\d+\.", key)
            cure = (
                "experts are fused here, use --model-backend megatron"
                if single
                else "another base's"
            )
            raise SetupError(f"{where}: --hf-model has no place for {key}: {cure}")
        names.update(meant)
    if not names:
        raise SetupError(f"{where}: holds no factors")
    settings = LoraSettings(
        rank=found["r"],
        alpha=float(found["lora_alpha"]),
        targets=tuple(short_names(every, names)),
        rslora=bool(found.get("use_rslora")),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
        backend=backend,
        nf4=nf4,
    )
    try:
        targets = chosen_targets(config, settings)
    except SetupError as error:
        raise SetupError(f"{where}: {error}") from error
    check_names(found, every, names, where)
    for target in targets.values():
        for key, shape in zip(target.keys, target.shapes, strict=True):
            if stored.pop(key, ()) != shape:
                raise SetupError(
                    f"{where}: {key} is not of shape {list(shape)}, as this base and rank {target.rank} "
                    f"need it: it is of another base or rank"
                )
    for key in stored:
        raise SetupError(f"{where}: {CONFIG} does not mean {key}: it is of another base or rank")
    return settings


def is_of(folder: str | Path, base: Path) -> bool:
    """Whether an adapter was trained on the weights of a base; true where it does not say on which."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        kept: str | None = (file.metadata() or {}).get(BASE)
    return kept is None or kept == weights_digest(base, like=kept)


def base_of(folder: str, where: str) -> str:
    """The model that an adapter to answer with says it is of: a folder, or a name on the hub.

    Raises:
        SetupError: it names none, or one whose weights are other ones; or its own cannot be read.
    """
    base = json_object(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise SetupError(
            f"{where}: {CONFIG} names no base_model_name_or_path; write its base there"
        )
    shapes_of(folder, where)
    try:
        source = local_model_folder(base)
    except SetupError as error:
        raise SetupError(f"{where}: its base_model_name_or_path {base} is not there") from error
    if not is_of(folder, source):
        raise SetupError(
            f"{where}: was trained on other weights than those of its base_model_name_or_path {base}"
        )
    return base


def shapes_of(folder: str | Path, where: str) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor, by its name without PEFT's prefix; each is looked at whole.

    Raises:
        SetupError: there are none, they cannot be read, or they are no finite numbers under PEFT's names.
    """
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise SetupError(f"{where}: holds no {WEIGHTS} (pickles are not read)")
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():
                dtype, value = opened.get_slice(key).get_dtype(), opened.get_tensor(key)
                if not key.startswith(PREFIX):
                    raise SetupError(f"{where}: {key} in {WEIGHTS} does not begin with {PREFIX}")
                if dtype not in _DTYPES or not bool(torch.isfinite(value).all()):
                    what = "holds NaN or infinity" if dtype in _DTYPES else f"is of {dtype}"
                    raise SetupError(f"{where}: {key} in {WEIGHTS} {what}; take another adapter")
                found[key.removeprefix(PREFIX)] = tuple(value.shape)
    except (SafetensorError, OSError) as error:
        raise SetupError(f"{where}: {WEIGHTS} is damaged ({error})") from error
    return found


def _same_rows(folder: str | Path, key: str, base: Path, name: str, rows: int = 64) -> bool:
    """Whether a stored matrix is the base's own, by rows spread over it."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file, HFCheckpoint(base) as weights:
        one, other = file.get_slice(PREFIX + key), weights.slice(name)
        size = one.get_shape()[0]
        return one.get_shape() == other.get_shape() and all(
            torch.equal(one[row : row + 1].float(), other[row : row + 1].float())
            for row in range(0, size, max(1, size // rows))
        )


def read_factors(folder: str | Path, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of one matrix in fp32."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        a, b = (file.get_tensor(PREFIX + key).float() for key in target.keys)
    return a, b


def write_adapter(
    folder: Path,
    config: PretrainedConfig,
    settings: LoraSettings,
    factors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    *,
    dropout: float,
    base: str,
    digest: str | None,
) -> None:
    """Write an adapter as PEFT does.

    Args:
        folder: an empty one.
        config: of the base.
        settings: of the adapter.
        factors: by `Target.keys`.
        targets: those of the adapter.
        dropout: it was trained with.
        base: name or folder of the base.
        digest: of its weights.
    """
    every = every_target(config, settings.backend)
    alpha, alphas = settings.alpha, settings.alpha_pattern
    names = [name for name, t in targets.items() if not t.fused]
    fused = short_names(every, targets.keys() - names)
    experts = any(t.weight.of_expert for t in targets.values())
    if any(t.weight.of_expert or t.fused for t in every.values()):
        # peft takes other modules of these names for experts too, but for those whose weight is named as
        # a parameter; these know no dropout.
        alike = [
            name
            for name in names
            if not targets[name].weight.of_expert and name.rpartition(".")[2] in _OF_EXPERTS
        ]
        fused += [f"{name}.weight" for name in alike]
        if not experts:
            names = [name for name in names if name not in alike]
        if alike or experts:
            dropout = 0.0
    # peft fuses experts' factors, and doubles alpha with the rank, which only without the square root
    # leaves the scaling as it is.
    rslora = settings.rslora and not experts
    if rslora != settings.rslora:
        alpha *= settings.rank**0.5
        alphas = {re.escape(n): t.scaling * t.rank for n, t in targets.items()}
        alphas = {name: value for name, value in alphas.items() if not math.isclose(value, alpha)}
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": alphas,
        "target_modules": short_names(every, names),
        "target_parameters": fused or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n")
    tensors = {PREFIX + name: value.contiguous() for name, value in factors.items()}
    metadata = {"format": "pt"} | ({BASE: digest} if digest else {})
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    let_all_read(folder)
