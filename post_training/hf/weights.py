"""Weights between HuggingFace and Megatron: what `families.model_weights` lists, in both directions.

A HuggingFace model keeps q, k, v, gate and up apart; Megatron fuses q, k, v by query group
(`[group: queries..., key, value]`) and gate with up, and splits all of them over the tensor parallel
group. Loading reads only the rows and columns of this rank, export takes a whole model apart again.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from post_training.errors import SetupError
from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.families import model_weights
from post_training.tensors.weight import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(.+\.mlp\.experts\.local_experts\.)(\d+)(\..+)")
_GROUPED_EXPERT = re.compile(r"(.+\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")
# Transformer Engine fuses each norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Sliced(Protocol):
    """Whole tensors of which parts are read: of files, by `get_shape()` and indexing, or in memory."""

    def slice(self, name: str) -> Any:
        """The tensor of a name."""


def whole_name(name: str, *, first_layer: int = 0, first_expert: int = 0) -> str:
    """The name of a parameter in a whole model of local layers, as `model_weights` lists it.

    Args:
        name: its name in its (unwrapped) model chunk, of local layers or Transformer Engine's.
        first_layer: index in the whole model of the chunk's layer 0.
        first_expert: index in the whole model of this rank's expert 0.
    """
    name = _GROUPED_EXPERT.sub(r"\1local_experts.\3.\2.weight", name)
    for fused, norm in _FUSED_NORMS.items():
        name = name.replace(fused, norm)
    name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + first_layer}{m[3]}", name)
    return _EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + first_expert}{m[3]}", name)


class _Rows:
    """Some rows of a tensor, which may lie in a file, as a tensor of their own."""

    def __init__(self, whole: Any, first: int, count: int) -> None:
        self.whole, self.first, self.count = whole, first, count

    def get_shape(self) -> Sequence[int]:
        """As of a file's tensor."""
        return [self.count, *_shape(self.whole)[1:]]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some of them."""
        part: torch.Tensor = self.whole[self.first + rows.start : self.first + rows.stop]
        return part


def _shard(size: int, rank: int, world: int) -> tuple[int, int]:
    step = size // world
    return rank * step, (rank + 1) * step


def _shape(part: Any) -> Sequence[int]:
    """That of a tensor in memory or in a file."""
    return part.shape if isinstance(part, torch.Tensor) else part.get_shape()


def _of_expert(value: torch.Tensor, weight: Weight) -> list[torch.Tensor]:
    """What a tensor that holds every expert says of one, with rows as Megatron has them."""
    rows = value.T if value.dim() == 2 else value
    return [rows[::2], rows[1::2]] if weight.layout == "gate_up" else [rows]


def read_parameter(
    checkpoint: Sliced,
    weight: Weight,
    shape: torch.Size,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor:
    """Read this rank's part of one Megatron parameter.

    Args:
        checkpoint: the HuggingFace weights.
        weight: what to read.
        shape: shape of the parameter on this rank.
        tp_rank: rank in the tensor parallel group.
        tp_size: size of the tensor parallel group.

    Returns:
        Values in the file's dtype. Rows of a padded vocabulary are zero.
    """
    parts = [checkpoint.slice(name) for name in weight.tensors]
    if weight.expert is not None:
        parts = _of_expert(parts[0][weight.expert], weight)
    if weight.sections:
        ends = list(itertools.accumulate(weight.sections))
        parts = [_Rows(parts[0], end - n, n) for end, n in zip(ends, weight.sections, strict=True)]
    if weight.layout == "replicated":
        return parts[0][:]
    if weight.layout == "vocabulary":
        start = tp_rank * shape[0]
        rows = parts[0][start : min(start + shape[0], _shape(parts[0])[0])]
        return torch.nn.functional.pad(rows, (0, 0, 0, shape[0] - rows.shape[0]))
    if weight.layout == "columns":
        start, end = _shard(_shape(parts[0])[1], tp_rank, tp_size)
        return parts[0][:, start:end]
    if weight.layout in ("gate_up", "rows"):
        return torch.cat([p[slice(*_shard(_shape(p)[0], tp_rank, tp_size))] for p in parts])
    first, last = _shard(weight.groups, tp_rank, tp_size)
    by_group = []
    for part in parts:
        rows_per_group = _shape(part)[0] // weight.groups
        rows = part[first * rows_per_group : last * rows_per_group]
        by_group.append(rows.reshape(last - first, rows_per_group, *rows.shape[1:]))
    fused = torch.cat(by_group, dim=1)
    return fused.reshape(-1, *fused.shape[2:])


def split_parameter(weight: Weight, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Undo `read_parameter` for a whole (not sharded) parameter.

    Yields:
        HuggingFace name and tensor; rows of a padded vocabulary are left out. Where one tensor holds every
        expert it is this expert's part.
    """
    names, rows = list(weight.tensors), [shape[0] for shape in weight.tensors.values()]
    if weight.expert is not None:
        if weight.layout == "gate_up":
            value = torch.stack(value.chunk(2), dim=1).flatten(0, 1)
        whole = value.T if value.dim() == 2 else value
        yield names[0], whole.clone(memory_format=torch.contiguous_format)
        return
    if weight.layout == "qkv":
        by_group = value.reshape(weight.groups, -1, *value.shape[1:])
        split = by_group.split([n // weight.groups for n in weight.sections or rows], dim=1)
        parts = [part.reshape(-1, *value.shape[1:]) for part in split]
    elif weight.layout == "gate_up" and not weight.sections:
        parts = list(value.split(rows))
    else:
        parts = [value[: rows[0]]]
    if len(parts) > len(names):
        parts = [torch.cat(parts)]
    for name, part in zip(names, parts, strict=True):
        # A copy: safetensors refuses tensors that share memory.
        yield name, part.clone(memory_format=torch.contiguous_format)


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """Parameters of an unwrapped `GPTModel` chunk: name in the chunk, name in a whole model, parameter."""
    whole = _whole_names(chunk)
    yield from ((name, whole(name), parameter) for name, parameter in chunk.named_parameters())


def _whole_names(chunk: torch.nn.Module) -> Callable[[str], str]:
    """Turns a name in an unwrapped `GPTModel` chunk into that in a whole model."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    megatron: Any = chunk.config
    first_layer = get_transformer_layer_offset(megatron, getattr(chunk, "vp_stage", None))
    experts = megatron.num_moe_experts or 0
    per_rank = experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = per_rank * parallel_state.get_expert_model_parallel_rank()
    return functools.partial(whole_name, first_layer=first_layer, first_expert=first_expert)


def _weights(
    chunk: torch.nn.Module, config: PretrainedConfig
) -> Iterator[tuple[torch.Tensor, Weight]]:
    """Each parameter of an unwrapped `GPTModel` chunk, and what routers add, with what makes it up."""
    every = model_weights(config)
    if config.tie_word_embeddings:
        # The last pipeline stage keeps a copy of the embedding.
        every["output_layer.weight"] = every["embedding.word_embeddings.weight"]
    whole = _whole_names(chunk)
    for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
        if isinstance(tensor, torch.nn.Parameter) or name.endswith(".expert_bias"):
            yield tensor, every[whole(name)]


@torch.no_grad()
def load_hf_weights(
    chunks: list[torch.nn.Module], folder: str | Path, config: PretrainedConfig
) -> None:
    """Fill model chunks with the weights of a HuggingFace folder; each rank reads its own shard only.

    Args:
        chunks: unwrapped `GPTModel` chunks of this rank.
        folder: the HuggingFace folder.
        config: its configuration.

    Raises:
        SetupError: a tensor is missing or has another shape than the configuration says.
    """
    from megatron.core import parallel_state

    dense = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    of_experts = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    with HFCheckpoint(folder) as checkpoint:
        for parameter, weight in (pair for chunk in chunks for pair in _weights(chunk, config)):
            for missing in (n for n in weight.tensors if n not in checkpoint):
                raise SetupError(f"--hf-model {folder}: the weights lack the tensor {missing}")
            rank, size = of_experts if weight.of_expert else dense
            value = read_parameter(checkpoint, weight, parameter.shape, rank, size)
            if value.shape != parameter.shape:
                raise SetupError(
                    f"--hf-model {folder}: {' + '.join(weight.tensors)} give shape "
                    f"{tuple(value.shape)} on this rank, config.json says {tuple(parameter.shape)}"
                )
            parameter.copy_(value)


@torch.no_grad()
def hf_state_dict(chunk: torch.nn.Module, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """HuggingFace tensors of a whole model (one chunk, tensor and pipeline parallel size 1).

    Returns:
        By HuggingFace name. A tied model has no `lm_head.weight`.
    """
    state: dict[str, torch.Tensor] = {}
    for parameter, weight in _weights(chunk, config):
        for name, value in split_parameter(weight, parameter.detach()):
            if weight.expert is None:
                state.setdefault(name, value)
            else:
                every = state.setdefault(name, value.new_empty(weight.tensors[name]))
                every[weight.expert] = value
    return state
