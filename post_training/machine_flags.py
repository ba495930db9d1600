"""Flags that follow from the machine: its device, and which packages with kernels are installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from post_training.platform import device_type


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here: it needs CUDA."""
    if device_type() != "cuda":
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def has_packed_kernel(*, fp32: bool) -> bool:
    """Whether Transformer Engine's attention has a kernel for packed documents on this GPU.

    cuDNN's needs Hopper or later, that of the package flash-attn Ampere; neither takes fp32. Without one
    Transformer Engine pads every document of a pack to the longest and keeps all scores.
    """
    if fp32:
        return False
    return torch.cuda.get_device_capability()[0] >= 9 or find_spec("flash_attn") is not None


def has_grouped_gemm() -> bool:
    """Whether this GPU computes all experts of a layer in one kernel (Megatron wants Ampere or later)."""
    return torch.cuda.get_device_capability()[0] >= 8


def platform_defaults(transformer_engine: bool) -> dict[str, Any]:
    """Flags that follow from the machine.

    Args:
        transformer_engine: whether the layers are those of Transformer Engine.
    """
    on_cuda = device_type() == "cuda"
    flags: dict[str, Any] = {
        "distributed_backend": "nccl" if on_cuda else "gloo",
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        # The output layer is Megatron's own in either case, and takes its kernel from Apex only.
        "gradient_accumulation_fusion": transformer_engine
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }
    if not transformer_engine:
        flags |= {
            # Kernels of Transformer Engine and Apex.
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "no_persist_layer_norm": True,
        }
    if not on_cuda:
        # Fused by torch.compile, which a CPU run does without.
        flags |= {
            "bias_swiglu_fusion": False,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
        }
    return flags
