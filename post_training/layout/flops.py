"""Floating point operations that a step's model takes, and the peak of the device: their ratio is MFU."""

from __future__ import annotations

import argparse
import math

import torch

from post_training.adapters.settings import (
    Target,
    chosen_targets,
    every_target,
    trained_parameters,
)

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets, by a part of its name.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops() -> float | None:
    """Peak of this rank's device in dense bf16 FLOP/s, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def model_flops(
    args: argparse.Namespace, *, real_tokens: float, trained_tokens: float, squared_lengths: float
) -> float:
    """Floating point operations of forward and backward passes, as the model needs them.

    Megatron's formula (`megatron/training/training.py`, `num_floating_point_operations`: 2 a multiplication
    and addition, times 3 for forward pass, gradients of input and weight; half the square of
    each document's length for causal attention), of documents without padding. It takes the logits of
    every token, 6 * hidden size * padded vocabulary each; here only trained tokens have any
    (`post_training/training/loss.py`), so those of the others are taken off. What
    `--recompute-granularity` computes again does not count, as in the definition of MFU
    (https://arxiv.org/abs/2204.02311, appendix B). Frozen matrices beside factors have no
    gradients: they take 4 operations a weight and token.

    Args:
        args: validated arguments.
        real_tokens: tokens of documents that all ranks together worked on.
        trained_tokens: those of them that have a label.
        squared_lengths: sum over the documents of their squared length.
    """
    from megatron.training.training import num_floating_point_operations

    of_all_tokens = num_floating_point_operations(
        args,
        batch_size=0,  # read only where the two counts are not given
        seqlen_squared_sum_in_batch=squared_lengths,
        total_real_tokens_in_batch=real_tokens,
    )
    without_logits = real_tokens - trained_tokens
    head = args.hidden_size * args.padded_vocab_size
    trained = of_all_tokens - 6 * head * without_logits
    if args.lora is None:
        return float(trained)

    def times(target: Target, count: int) -> float:
        """How often `count` elements of a matrix meet a token."""
        if not target.is_of("all"):
            return count * (trained_tokens if target.kind in ("embedding", "output", "tied") else 0)
        chosen = args.moe_router_topk / args.num_experts if target.weight.of_expert else 1.0
        chosen = chosen if target.module is None else target.module.share
        return count * chosen * real_tokens

    every = every_target(args.hf_config, args.lora.backend).values()
    frozen = sum(times(t, math.prod(t.shape) * max(1, t.fused)) for t in every if t.is_of("all"))
    factors = chosen_targets(args.hf_config, args.lora).values()
    added = sum(times(t, trained_parameters([t])) for t in factors)
    return float(trained - 2 * (frozen + head * trained_tokens) + 6 * added)
