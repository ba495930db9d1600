"""`pretrain()` refuses to start without CUDA and warms kernels up that a CPU does not have.

Upstream: megatron-core 0.19.2, `training/training.py` (`initialize_megatron()` is called without
`allow_no_cuda`; `set_jit_fusion_options` compiles CUDA kernels).
"""

from __future__ import annotations

import functools


def apply() -> None:
    """Allow `pretrain()` to initialise on CPU, and skip the warm-up of fused kernels."""
    from megatron.training import training

    initialize = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    setattr(training, "initialize_megatron", initialize)  # noqa: B010
    setattr(training, "set_jit_fusion_options", lambda tp_size=None: None)  # noqa: B010
