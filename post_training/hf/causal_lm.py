"""Any causal language model of `transformers`: built from its configuration, filled from a folder by parts.

`transformers` fills a whole model in every process. Here a model is built without memory (on the meta
device), and each rank reads what it holds: the rows of its shard, or, where a parameter is made of several
tensors of the files (experts side by side), the tensors of that one parameter. Which tensors make which
parameter is what `transformers` itself says (`conversion_mapping`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from post_training.errors import SetupError
from post_training.hf.check import COMPUTED, DTYPES, refuse_leftovers
from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.config import sees

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# In config.json, whatever the family: probabilities with which training drops something.
_DROPOUT = re.compile(r".*(dropout|_pdrop|layerdrop).*")


def build_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "meta",
    trust_remote_code: bool = False,
) -> Any:
    """The model of a configuration: without memory by default, else with random weights.

    Its configuration is a copy, so that what is set there is set for this model only; nothing is dropped.
    """
    own = copy.deepcopy(config)
    for part in {id(own): own, id(text := own.get_text_config()): text}.values():
        for key, value in vars(part).items():
            if _DROPOUT.fullmatch(key) and isinstance(value, float):
                setattr(part, key, 0.0)
    with torch.device(device):
        model = auto_class(config).from_config(
            own, dtype=dtype, trust_remote_code=trust_remote_code
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # a padding token that is written is trained like any other
    return model


def auto_class(config: PretrainedConfig) -> Any:
    """What of `transformers` makes the model: a causal language model, or one that also sees."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if sees(config):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def state_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied one under each of its names.

    Of a model with factors (`adapters/injected.py`) those of its base, by the names that they have without.
    """
    state = model.state_dict(keep_vars=True)
    return {_plain(name): value for name, value in state.items() if ".lora_" not in name}


def _plain(name: str) -> str:
    return name.replace(".base_layer", "").replace(".weight_nf4", ".weight")


def _rules(model: Any) -> tuple[list[Any], list[Any]]:
    """How the files' names become the model's: renamings, and conversions of several tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    every = get_model_conversion_mapping(model)
    converters = [rule for rule in every if isinstance(rule, WeightConverter)]
    return [rule for rule in every if not isinstance(rule, WeightConverter)], converters


class ReadingPlan:
    """Which tensors of a folder make which tensors of a model."""

    def __init__(self, model: Any, checkpoint: HFCheckpoint) -> None:
        """Look at names only.

        Args:
            model: on any device.
            checkpoint: the folder's files.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        self.model, self.checkpoint = model, checkpoint
        self.wanted = state_names(model)
        self.plain: dict[str, str] = {}
        """The file's name of each tensor that is taken as it is."""
        self.converted: dict[str, Any] = {}
        """By the first tensor it makes, a conversion that has been told its sources."""
        self.unknown: list[str] = []
        renamings, converters = _rules(model)
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = model.base_model_prefix
        for key in sorted(checkpoint, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.wanted)
            if name not in self.wanted:
                other, _ = rename_source_key(key, [], [], prefix, self.wanted)
                if other in self.wanted:
                    name, pattern = other, None
            if name not in self.wanted:
                self.unknown.append(key)
            elif pattern is None:
                self.plain[name] = key
            else:
                rule = self.converted.setdefault(name, copy.deepcopy(by_pattern[pattern]))
                rule.add_tensor(name, key, pattern, lambda key=key: checkpoint.slice(key)[...])

    def missing(self) -> list[str]:
        """Tensors of the model that nothing makes, nor any that they are tied to."""
        made = {*self.plain, *self.converted}
        for name, rule in self.converted.items():
            first = next(t for t in rule.target_patterns if t in name)
            made |= {name.replace(first, other) for other in rule.target_patterns}
        alike = {id(self.wanted[name]) for name in made if name in self.wanted}
        optional = list(getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ())
        return [
            name
            for name, tensor in self.wanted.items()
            if name not in made
            and id(tensor) not in alike
            and not any(re.search(pattern, name) for pattern in optional)
        ]

    def leftovers(self) -> list[str]:
        """Tensors of the files that the model has no place for."""
        passed = list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        return [
            key
            for key in self.unknown
            if not COMPUTED.fullmatch(key) and not any(re.search(p, key) for p in passed)
        ]

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Names of the model's tensors and their values: lazy slices of a file, or tensors."""
        for name, key in self.plain.items():
            yield name, self.checkpoint.slice(key)
        for name, rule in self.converted.items():
            made = rule.convert(name, model=self.model, config=self.model.config)
            for target, value in made.items():
                yield target, value[0] if isinstance(value, list) else value


def check_weights(folder: Path, config: PretrainedConfig, model: Any) -> None:
    """Check by names, dtypes and shapes that the weights of a folder are the model's, all and no others.

    Args:
        folder: of the weights.
        config: of the model.
        model: built from it, without memory.

    Raises:
        SetupError: they are not.
    """
    with HFCheckpoint(folder) as checkpoint:
        plan = ReadingPlan(model, checkpoint)
        for name in plan.missing():
            raise SetupError(f"--hf-model {folder}: the weights lack the tensor {name}")
        for key in checkpoint:
            dtype = checkpoint.slice(key).get_dtype()
            if dtype not in DTYPES and key not in plan.unknown and dtype[0] != "I":
                raise SetupError(
                    f"--hf-model {folder}: {key} is {dtype}; only fp32, bf16 and fp16 weights can be "
                    f"trained, so give the model's bf16 weights"
                )
        for name, key in plan.plain.items():
            found = tuple(checkpoint.slice(key).get_shape())
            if found != tuple(plan.wanted[name].shape):
                raise SetupError(
                    f"--hf-model {folder}: {key} has shape {list(found)}, "
                    f"config.json says {list(plan.wanted[name].shape)}"
                )
        if leftovers := plan.leftovers():
            refuse_leftovers(leftovers, folder, config)


@torch.no_grad()
def fill_from_folder(model: Any, folder: Path) -> None:
    """Fill a model, sharded or whole, with the weights of a folder; each rank reads its own rows.

    Args:
        model: with memory for its weights.
        folder: that `check_weights` has passed.

    Raises:
        SetupError: a tensor has another shape than the configuration says.
    """
    with HFCheckpoint(folder) as checkpoint:
        plan = ReadingPlan(model, checkpoint)
        packed = {_plain(f"{n}.weight"): m for n, m in model.named_modules() if hasattr(m, "pack")}
        for name, value in plan.tensors():
            if name in plan.wanted:
                what = f"--hf-model {folder}: {name}"
                fill(plan.wanted[name], value, what, packed.get(name))


def fill(tensor: Tensor, value: Any, what: str, layer: Any = None) -> None:
    """Copy a whole tensor, or a lazy slice of a file, into one that may be cut by rows over ranks.

    Args:
        tensor: of the model.
        value: all of it; only the rows that this rank holds are read.
        what: it is, for the message.
        layer: which keeps it in another form, if one does: its `pack` makes that of rows.

    Raises:
        SetupError: the shapes differ.
    """
    found = tuple(value.shape if isinstance(value, Tensor) else value.get_shape())
    shape = tuple(tensor.shape) if layer is None else (layer.out_features, layer.in_features)
    if found != shape:
        raise SetupError(f"{what} has shape {list(found)} in the files, {list(shape)} in the model")
    if isinstance(tensor, DTensor):
        local, mesh = tensor.to_local(), tensor.device_mesh
        # As `torch.chunk` cuts: the last ranks may hold fewer rows, or none.
        rows = -(-tensor.shape[0] // mesh.size())
        begin = min(mesh.get_local_rank() * rows, tensor.shape[0])
        tensor, value = local, value[begin : begin + local.shape[0]]
    else:
        value = value[...]
    tensor.copy_(value if layer is None else layer.pack(value))


def complete(model: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> None:
    """After a model has been given memory: what is one tensor is one again, and buffers have values.

    Those that no file holds, such as rotary frequencies, `transformers` computes in `_init_weights`, as for
    every model that it loads; where it does not (code of a model's own), a second model is built, which
    has them.

    Args:
        model: with memory, its parameters and persistent buffers as they may be.
        config: of the model.
        trust_remote_code: its code may be run.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        model.tie_weights()  # FSDP2 keeps to it by itself
    kept = {id(tensor) for tensor in state_names(model).values()}
    buffers = {name: b for name, b in model.named_buffers() if id(b) not in kept}
    for buffer in buffers.values():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = hasattr(module, "pack")
    for tensor in state_names(model).values():
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010
    with torch.no_grad():
        model.initialize_weights()
    if trust_remote_code or any(bool(b.isnan().any()) for b in buffers.values()):
        whole = build_model(config, device="cpu", trust_remote_code=trust_remote_code)
        for name, buffer in buffers.items():
            buffer.copy_(whole.get_buffer(name))
