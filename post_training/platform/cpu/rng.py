"""Megatron keeps its tensor-parallel random states on the CUDA generator; on CPU there is one generator.

Upstream: megatron-core 0.19.2, `core/tensor_parallel/random.py` (`CudaRNGStatesTracker` forks states
through `_get_cuda_rng_state` and `_set_cuda_rng_state`).
"""

from __future__ import annotations

from typing import Any

import torch


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not torch.manual_seed: it calls the functions that this replaces.
    torch.default_generator.manual_seed(seed)


def apply() -> None:
    """Let the tracker, and `torch.cuda`'s own functions, read and write the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    for owner, name, replacement in (
        (megatron_random, "_get_cuda_rng_state", _get_state),
        (megatron_random, "_set_cuda_rng_state", _set_state),
        (torch.cuda, "get_rng_state", _get_state),
        (torch.cuda, "set_rng_state", _set_state),
        (torch.cuda, "manual_seed", _seed),
        (torch.cuda, "manual_seed_all", _seed),
    ):
        setattr(owner, name, replacement)
