"""Which parts of a `transformers` model hold matrices: found by looking at one without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from post_training.hf.causal_lm import build_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What config.json calls the number of experts, and models the part that chooses among them.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Module:
    """One part with a weight of its own."""

    kind: str
    """As of `Target`."""
    shape: tuple[int, ...]
    """Rows and columns, of fused experts those of one; of other parts the weight's."""
    experts: int = 0
    """Whose matrices are fused in it."""
    share: float = 1.0
    """Of the tokens that meet one of them."""
    tower: str = ""
    """Name of the part that sees, if it is in one."""
    linear: bool = False
    """Whether it is a `torch.nn.Linear` itself."""


_seen: dict[int, tuple[Any, int, dict[str, Module]]] = {}


def modules_of(config: PretrainedConfig) -> dict[str, Module]:
    """All parts of a model that hold a weight, by name; of fused experts the name is the parameter's."""
    return _looked_at(config)[2]


def parameters_of(config: PretrainedConfig) -> int:
    """Elements of all parameters of a model."""
    return _looked_at(config)[1]


def _looked_at(config: PretrainedConfig) -> tuple[Any, int, dict[str, Module]]:
    if id(config) not in _seen:
        _seen[id(config)] = config, *_look(config)  # kept, so that the id is nobody else's
    return _seen[id(config)]


def _look(config: PretrainedConfig) -> tuple[int, dict[str, Module]]:
    trust = not type(config).__module__.startswith("transformers.")  # else it would not be here
    model = build_model(config, trust_remote_code=trust)
    text = model.config.get_text_config()
    experts = next((n for key in _EXPERTS if type(n := getattr(text, key, None)) is int), 0)
    parts = dict(model.named_modules())
    language = ""
    if text is not model.config:
        kinds = ((name, type(getattr(part, "config", None))) for name, part in parts.items())
        language = next((f"{name}." for name, kind in kinds if name and kind is type(text)), "")
    head = model.get_output_embeddings()
    found: dict[str, Module] = {}
    for name, part in parts.items():
        tower = ""
        if not name.startswith(language) and part is not head:
            outside = language.rstrip(".").rpartition(".")[0]
            tower = name.removeprefix(outside).lstrip(".").partition(".")[0]
        for key, parameter in part.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if len(shape) == 3 and shape[0] == experts:
                # As PEFT reads it: [experts, rows, columns] but for models that say otherwise.
                one = shape[:0:-1] if getattr(part, "is_transposed", False) else shape[1:]
                share = min(1.0, getattr(text, "num_experts_per_tok", experts) / experts)
                found[f"{name}.{key}"] = Module("mlp", one, experts, share)
            elif key == "weight":
                kind = _kind(name, part, parts, model, experts)
                if kind in ("attention", "mlp") and tower:
                    kind = "vision"
                one = shape[::-1] if type(part).__name__ == "Conv1D" else shape
                linear = type(part) is torch.nn.Linear
                found[name] = Module(kind, one, tower=tower, linear=linear)
    return sum(parameter.numel() for parameter in model.parameters()), found


def _kind(name: str, part: Any, parts: dict[str, Any], model: Any, experts: int) -> str:
    """What a part with a weight is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if part in (embedding, head):
        if head is not None and embedding.weight is head.weight:
            return "tied"
        return "output" if part is head else "embedding"
    above, _, last = name.rpartition(".")
    if part.weight.dim() != 2:
        return "norm" if part.weight.dim() == 1 else "layer"
    if experts and (len(part.weight) == 1 or any(n in _ROUTERS for n in name.split(".")[-2:])):
        return "router"
    # Kernels of state-space layers take the weight of their last matrix and do not call it.
    taken = last == "out_proj" and hasattr(parts[above], "A_log")
    if taken or not (isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D"):
        return "layer"
    return "attention" if "attn" in above or "attention" in above else "mlp"
