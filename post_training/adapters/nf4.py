"""Frozen matrices in 4 bits: NF4 of QLoRA (https://arxiv.org/abs/2305.14314, appendix E for the levels).

Of each row, blocks of 64 values are divided by their largest and become numbers of the nearest of 16
levels. A row is a row of bytes, four a block for the largest and then two values a byte, so that whoever
holds some rows (FSDP2 cuts by rows) holds all that these are made of: 0.5625 bytes a value.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
_BYTES = 4 + BLOCK // 2
# The quantiles of a normal distribution, scaled to [-1, 1], with 0 among them.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte: float32 [256, 2]; made once, since a copy to a GPU waits."""
    return torch.cartesian_prod(LEVELS, LEVELS).to(device)


def quantise(matrix: Tensor) -> Tensor:
    """Bytes of a matrix [rows, columns]: uint8 [rows, 36 for each 64 columns]."""
    blocks = F.pad(matrix.float(), (0, -matrix.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)
    levels = LEVELS.to(matrix.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, between).to(torch.uint8)
    pairs = codes[..., ::2] * 16 + codes[..., 1::2]
    return torch.cat([largest.view(torch.uint8), pairs], dim=-1).flatten(1)


def dequantise(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] that bytes stand for."""
    blocks = packed.unflatten(1, (-1, _BYTES))
    largest = blocks[..., :4].contiguous().view(torch.float32)
    values = F.embedding(blocks[..., 4:].int(), _pairs(packed.device)).flatten(-2) * largest
    return values.flatten(1)[:, :columns].to(dtype)


class _Product(torch.autograd.Function):
    """x times the matrix, which is made from its bytes in either pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.matrix = columns, dtype
        return F.linear(x, dequantise(packed, columns, dtype).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        matrix = dequantise(packed, *ctx.matrix).to(gradient.dtype)
        return gradient @ matrix, None, None, None


class NF4Linear(torch.nn.Linear):
    """In the place of a frozen linear layer; its `weight` is None, so what uses that directly fails."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        """In the place of `layer`, whose weight will come from files."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        size = (self.out_features, -(-self.in_features // BLOCK) * _BYTES)
        packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight_nf4 = torch.nn.Parameter(packed, requires_grad=False)
        self.register_parameter("weight", None)
        self.bias = layer.bias

    def pack(self, rows: Tensor) -> Tensor:
        """Bytes of rows of the weight, which are first rounded as the run rounds them."""
        return quantise(rows.to(self.dtype))

    def whole(self) -> torch.nn.Linear:
        """A plain layer of the same values."""
        plain = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        values = dequantise(self.weight_nf4, self.in_features, self.dtype)
        plain.weight, plain.bias = torch.nn.Parameter(values, requires_grad=False), self.bias
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """As of the layer."""
        out: Tensor = _Product.apply(input, self.weight_nf4, self.in_features, self.dtype)
        return out if self.bias is None else out + self.bias
