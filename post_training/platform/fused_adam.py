"""One kernel for torch's own Adam, which Megatron uses where Transformer Engine and Apex are missing.

Upstream: megatron-core 0.19.2, `core/optimizer/__init__.py` builds `torch.optim.AdamW` (or `Adam`) with
torch's defaults. On a GPU these work on all parameters at once and hold a temporary copy of them, 4 bytes
a parameter: 32 GB for 8 billion. On a CPU they go through memory ten times for each parameter. The fused
kernel does neither.
"""

from __future__ import annotations

from typing import Any

import torch

from post_training.platform.patches import in_place_of


def fuse(optimizer: Any) -> None:
    """Let torch's Adam use its fused kernel from the next step on; other optimizers are left alone."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False


def apply() -> None:
    """Wrap the function that makes every optimizer."""
    from megatron.core import optimizer as module

    if not module.USING_PYTORCH_OPTIMIZER:
        return

    @in_place_of((module, "_get_megatron_optimizer_based_on_param_groups"))
    def make_fused(make: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        # Without Megatron's wrapping: the optimizer and what makes its state.
        fuse(made[0] if isinstance(made, tuple) else made.optimizer)
        return made
