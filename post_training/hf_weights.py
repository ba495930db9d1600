"""Weights between HuggingFace and Megatron names: one table, read in both directions.

A HuggingFace model keeps q, k, v, gate and up apart; Megatron fuses q, k, v by query group
(`[group: queries..., key, value]`) and gate with up, and splits all of them over the tensor parallel
group. `parameter_source` says for one Megatron parameter which HuggingFace tensors make it up;
loading reads only the rows and columns of this rank, export joins the shards' whole again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from post_training.errors import SetupError
from post_training.hf_checkpoint import HFCheckpoint
from post_training.hf_config import head_dim

Layout = Literal["replicated", "vocabulary", "qkv", "gate_up", "columns"]


@dataclass(frozen=True)
class Source:
    """Where the values of one Megatron parameter come from."""

    layout: Layout
    """How the HuggingFace tensors are joined and split over the tensor parallel group."""
    names: tuple[str, ...]
    """Names of the HuggingFace tensors."""


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")

# By the name inside a layer; Transformer Engine fuses each norm into the linear layer behind it.
_IN_LAYER: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "input_layernorm.weight": ("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_qkv.bias": (
        "qkv",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ),
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": ("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
    "mlp.router.weight": ("replicated", ("mlp.gate.weight",)),
}
_OUTSIDE_LAYERS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("vocabulary", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": ("replicated", ("model.norm.weight",)),
    "output_layer.weight": ("vocabulary", ("lm_head.weight",)),
}


def parameter_source(name: str, *, first_layer: int, first_expert: int, tied: bool) -> Source:
    """Say where a Megatron parameter's values come from.

    Args:
        name: the parameter's name in its (unwrapped) model chunk.
        first_layer: index in the whole model of the chunk's layer 0.
        first_expert: index in the whole model of this rank's expert 0.
        tied: the output layer shares the embedding's weights.

    Raises:
        KeyError: no HuggingFace tensor belongs to `name`.
    """
    if name in _OUTSIDE_LAYERS:
        layout, names = _OUTSIDE_LAYERS[name]
        if name == "output_layer.weight" and tied:
            # The last pipeline stage keeps a copy of the embedding.
            names = _OUTSIDE_LAYERS["embedding.word_embeddings.weight"][1]
        return Source(layout, names)
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    prefix = f"model.layers.{int(match[1]) + first_layer}."
    inside = match[2]
    if inside in _IN_LAYER:
        layout, names = _IN_LAYER[inside]
        return Source(layout, tuple(prefix + n for n in names))
    if expert := _LOCAL_EXPERT.fullmatch(inside):
        number, linear = int(expert[1]), expert[2]
    elif expert := _GROUPED_EXPERT.fullmatch(inside):
        number, linear = int(expert[2]), expert[1]
    else:
        raise KeyError(name)
    layout, names = _IN_LAYER[f"mlp.{linear}.weight"]
    expert_prefix = f"{prefix}mlp.experts.{number + first_expert}."
    return Source(layout, tuple(expert_prefix + n.removeprefix("mlp.") for n in names))


def _shard(size: int, rank: int, world: int) -> tuple[int, int]:
    step = size // world
    return rank * step, (rank + 1) * step


def read_parameter(
    checkpoint: HFCheckpoint,
    source: Source,
    shape: torch.Size,
    config: PretrainedConfig,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor:
    """Read this rank's part of one Megatron parameter.

    Args:
        checkpoint: the HuggingFace weights.
        source: what to read.
        shape: shape of the parameter on this rank.
        config: the HuggingFace configuration.
        tp_rank: rank in the tensor parallel group.
        tp_size: size of the tensor parallel group.

    Returns:
        Values in the file's dtype. Rows of a padded vocabulary are zero.
    """
    parts = [checkpoint.slice(name) for name in source.names]
    if source.layout == "replicated":
        return parts[0][:]
    if source.layout == "vocabulary":
        start = tp_rank * shape[0]
        rows = parts[0][start : min(start + shape[0], parts[0].get_shape()[0])]
        return torch.nn.functional.pad(rows, (0, 0, 0, shape[0] - rows.shape[0]))
    if source.layout == "columns":
        start, end = _shard(parts[0].get_shape()[1], tp_rank, tp_size)
        return parts[0][:, start:end]
    if source.layout == "gate_up":
        start, end = _shard(parts[0].get_shape()[0], tp_rank, tp_size)
        return torch.cat([part[start:end] for part in parts])
    groups = config.num_key_value_heads
    first, last = _shard(groups, tp_rank, tp_size)
    by_group = []
    for part in parts:
        rows_per_group = part.get_shape()[0] // groups
        rows = part[first * rows_per_group : last * rows_per_group]
        by_group.append(rows.reshape(last - first, rows_per_group, *rows.shape[1:]))
    fused = torch.cat(by_group, dim=1)
    return fused.reshape(-1, *fused.shape[2:])


def split_parameter(
    source: Source, value: torch.Tensor, config: PretrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Undo `read_parameter` for a whole (not sharded) parameter.

    Yields:
        HuggingFace name and tensor; rows of a padded vocabulary are left out.
    """
    if source.layout == "vocabulary":
        yield source.names[0], value[: config.vocab_size].clone()
    elif source.layout == "gate_up":
        for name, part in zip(source.names, value.chunk(2), strict=True):
            # A copy: safetensors refuses tensors that share memory.
            yield name, part.clone()
    elif source.layout == "qkv":
        groups, dim = config.num_key_value_heads, head_dim(config)
        queries = config.num_attention_heads // groups * dim
        by_group = value.reshape(groups, queries + 2 * dim, *value.shape[1:])
        for name, part in zip(
            source.names, by_group.split([queries, dim, dim], dim=1), strict=True
        ):
            yield name, part.reshape(-1, *value.shape[1:]).contiguous()
    else:
        yield source.names[0], value.contiguous()


def _sources(chunk: torch.nn.Module, tied: bool) -> Iterator[tuple[torch.nn.Parameter, Source]]:
    """Each parameter of an unwrapped `GPTModel` chunk with its source."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config: Any = chunk.config
    first_layer = get_transformer_layer_offset(config, getattr(chunk, "vp_stage", None))
    experts = config.num_moe_experts or 0
    per_rank = experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = per_rank * parallel_state.get_expert_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        source = parameter_source(
            name, first_layer=first_layer, first_expert=first_expert, tied=tied
        )
        yield parameter, source


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

    tied = bool(config.tie_word_embeddings)
    with HFCheckpoint(folder) as checkpoint:
        for chunk in chunks:
            for parameter, source in _sources(chunk, tied):
                for missing in (n for n in source.names if n not in checkpoint):
                    raise SetupError(f"--hf-model {folder}: the weights lack the tensor {missing}")
                is_expert = ".mlp.experts." in source.names[0]
                rank, size = (
                    (
                        parallel_state.get_expert_tensor_parallel_rank(),
                        parallel_state.get_expert_tensor_parallel_world_size(),
                    )
                    if is_expert
                    else (
                        parallel_state.get_tensor_model_parallel_rank(),
                        parallel_state.get_tensor_model_parallel_world_size(),
                    )
                )
                value = read_parameter(checkpoint, source, parameter.shape, config, rank, size)
                if value.shape != parameter.shape:
                    raise SetupError(
                        f"--hf-model {folder}: {' + '.join(source.names)} give shape "
                        f"{tuple(value.shape)} on this rank, config.json says {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)


@torch.no_grad()
def hf_state_dict(chunk: torch.nn.Module, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """HuggingFace tensors of a whole model (one chunk, tensor and pipeline parallel size 1).

    Returns:
        By HuggingFace name. A tied model has no `lm_head.weight`.
    """
    tied = bool(config.tie_word_embeddings)
    state: dict[str, torch.Tensor] = {}
    for parameter, source in _sources(chunk, tied):
        for name, value in split_parameter(source, parameter.detach(), config):
            state.setdefault(name, value)
    return state
