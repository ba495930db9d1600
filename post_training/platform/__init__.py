"""The only place that may replace a function of another library.

One small file a subject. Each says what it replaces, why, and in which upstream version it was
needed; `tests/post_training/platform/` fails when upstream no longer needs it. On a machine with
CUDA only what the wheels lack is mended; the rest makes Megatron's `pretrain()` run on CPU.
"""

from __future__ import annotations

import logging
import warnings

from post_training.machine import environment
from post_training.machine.device import device_type, warn_once

_applied = False


def apply() -> None:
    """Prepare torch and Megatron for this machine; call it before `megatron.training` is imported.

    Calling it again does nothing.
    """
    global _applied
    if _applied:
        return
    _applied = True
    # Missing accelerator packages are a normal state here; flags that need them are not set.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).* not installed")
    warnings.filterwarnings("ignore", message="Only transformer-engine>=1.7.0 supports MoE")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    environment.stand_alone()
    environment.let_memory_grow()
    on_cpu = device_type() == "cpu"
    # torch first: Megatron reads these names while it is being imported.
    _compile_or_not(device_type())
    if on_cpu:
        from post_training.platform.cpu import cuda_runtime, tensor_devices

        cuda_runtime.apply()
        tensor_devices.apply()

    from post_training.platform import kernel_packages

    kernel_packages.apply()

    from post_training.platform import (
        dataset_helpers,
        fsdp2,
        fused_adam,
        gradient_norm,
        megatron_post_training,
        training_hooks,
    )
    from post_training.platform.checkpoints import (
        loading,
        optimizer_shards,
        optimizer_state,
        random_states,
        saving,
        torch_dcp,
    )

    for each in (
        *(
            megatron_post_training,
            dataset_helpers,
            gradient_norm,
            optimizer_shards,
            optimizer_state,
        ),
        *(fused_adam, fsdp2, torch_dcp, training_hooks, loading, saving, random_states),
    ):
        each.apply()
    if on_cpu:
        from post_training.platform.cpu import collectives, initialize, rng

        rng.apply()
        initialize.apply()
        collectives.apply()


def _compile_or_not(device: str) -> None:
    """Leave `torch.compile` out on a CPU, and on a GPU where it would raise."""
    from post_training.platform import compilation

    missing = None if device == "cpu" else compilation.what_is_missing()
    if missing is not None:
        warn_once(f"torch.compile needs {missing}: going on without fused element-wise kernels")
    if device == "cpu" or missing is not None:
        compilation.apply()
