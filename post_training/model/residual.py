"""What some families do beside the layers of Megatron: norms behind a part of a layer, and factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from post_training.hf.families import Factors
from post_training.model.norm import LocalNorm


class ScaledAdd(torch.nn.Module):
    """Norms or multiplies what a part of a layer gives before it is added to the residual stream.

    Stands where Megatron's `get_bias_dropout_add` stands in a layer's spec.
    """

    def __init__(self, config: TransformerConfig, factor: float, normed: bool) -> None:
        """Build the norm over the hidden size where it is `normed`."""
        super().__init__()
        self.factor = factor
        self.norm = (
            LocalNorm(config, config.hidden_size, eps=config.layernorm_epsilon) if normed else None
        )

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """A function of (output, bias), residual and dropout's probability; all [tokens, rows, hidden]."""
        add = get_bias_dropout_add(training, fused)

        def scaled(given: tuple[Tensor, Tensor | None], residual: Tensor, drop: float) -> Tensor:
            output, bias = given
            output = output if bias is None else output + bias
            output = output if self.norm is None else self.norm(output)
            added: Tensor = add((output * self.factor, None), residual, drop)
            return added

        return scaled


def install_factors(chunk: Any, factors: Factors) -> None:
    """Multiply the embeddings and the logits of a model chunk, where it has these parts."""
    places = (("embedding", factors.embedding), ("output_layer", factors.logits))
    for name, factor in places:
        if factor != 1.0 and (part := getattr(chunk, name, None)) is not None:
            part.register_forward_hook(functools.partial(_times, factor=factor))


def _times(part: Any, given: Any, output: Any, *, factor: float) -> Any:
    """A module's output, or the first of two, times a factor: as its forward hook."""
    return output * factor if isinstance(output, Tensor) else (output[0] * factor, *output[1:])
