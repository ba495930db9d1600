"""The only place that may replace a function of another library.

One small file a subject. Each says what it replaces, why, and in which upstream version it was
needed; `tests/post_training/platform/` fails when upstream no longer needs it. On a machine with
CUDA only what the wheels lack is mended; the rest makes Megatron's `pretrain()` run on CPU.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

import torch

__all__ = ["apply", "current_device", "device_type", "warn_once"]

_applied = False


def device_type() -> str:
    """The type of device this process trains on: `"cuda"` where torch sees one, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def current_device() -> torch.device:
    """Where this rank computes and exchanges tensors."""
    if device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def warn_once(message: str) -> None:
    """Print a warning in one process of each machine, before ranks know each other."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


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
    _stand_alone()
    on_cpu = device_type() == "cpu"
    # torch first: Megatron reads these names while it is being imported.
    _compile_or_not(device_type())
    if on_cpu:
        from post_training.platform import cuda_runtime, tensor_devices

        cuda_runtime.apply()
        tensor_devices.apply()

    from post_training.platform import kernel_packages

    kernel_packages.apply()

    from post_training.platform import (
        checkpoint_loading,
        checkpoint_saving,
        dataset_helpers,
        fsdp2,
        fused_adam,
        gradient_norm,
        megatron_post_training,
        optimizer_shards,
        optimizer_state,
        random_states,
        training_hooks,
    )

    megatron_post_training.apply()
    dataset_helpers.apply()
    gradient_norm.apply()
    optimizer_shards.apply()
    optimizer_state.apply()
    fused_adam.apply()
    fsdp2.apply()
    training_hooks.apply()
    checkpoint_loading.apply()
    checkpoint_saving.apply()
    random_states.apply()
    if on_cpu:
        from post_training.platform import cpu_collectives, cpu_initialize, cpu_rng

        cpu_rng.apply()
        cpu_initialize.apply()
        cpu_collectives.apply()


def _compile_or_not(device: str) -> None:
    """Leave `torch.compile` out on a CPU, and on a GPU where it would raise."""
    from post_training.platform import compilation

    missing = None if device == "cpu" else compilation.what_is_missing()
    if missing is not None:
        warn_once(f"torch.compile needs {missing}: going on without fused element-wise kernels")
    if device == "cpu" or missing is not None:
        compilation.apply()


def _stand_alone() -> None:
    """Let a process without a launcher be rank 0 of 1: torch asks for the launcher's variables."""
    if "RANK" in os.environ:
        return
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in os.environ:
        # Each task would take itself for the whole job and write over the others.
        raise SystemExit(
            "error: srun started several tasks, but RANK and WORLD_SIZE are not set: start torchrun in "
            "one task a node, or export them from SLURM_PROCID and SLURM_NTASKS"
        )
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),  # nobody else has to know it: the store takes one that is free
    ):
        os.environ.setdefault(name, value)
