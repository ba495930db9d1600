"""Which kernels there are on this machine: by its device and the packages that are installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from post_training.machine.device import device_type


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
    return _capability() >= 9 or find_spec("flash_attn") is not None


def has_grouped_gemm() -> bool:
    """Whether this GPU computes all experts of a layer in one kernel (Megatron wants Ampere or later)."""
    return _capability() >= 8


def _capability() -> int:
    """Of the GPU here; of one that this machine checks for and does not have, a recent one's."""
    if os.environ.get("SFT_DEVICE") == "cuda" and not torch.cuda.is_available():
        return 9
    return torch.cuda.get_device_capability()[0]
