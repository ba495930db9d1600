"""Megatron writes `device="cuda"` and `.cuda()` in its source; on CPU both must mean "here".

Upstream: megatron-core 0.19.2 (e.g. `training/training.py`, `core/optimizer/optimizer.py`). Only the
tensor factories and the few methods that name a device are wrapped, so that no operation of the
forward or backward pass is intercepted. `Tensor.type()` is wrapped because Megatron's optimizers
compare it with `"torch.cuda.FloatTensor"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
NEW_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def is_cuda_device(device: object) -> bool:
    """Whether `device` (a name, an index or a `torch.device`) means a CUDA device."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if is_cuda_device(kwargs.get("device")):
                kwargs["device"] = "cpu"
            # Pinned memory needs an accelerator.
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _identity(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def apply() -> None:
    """Wrap the factories of `torch`, `Tensor.new_*`, `.to`, `.cuda`, `.pin_memory` and `.type`."""
    # `with torch.device(...)` knows factories by identity, from a list it makes when it is first used:
    # it must hold the functions that the wrappers call.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in NEW_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))

    tensor_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The first positional argument is a device, a dtype or a tensor.
        if (
            args
            and not isinstance(args[0], (torch.dtype, torch.Tensor))
            and is_cuda_device(args[0])
        ):
            args = ("cpu", *args[1:])
        if kwargs and is_cuda_device(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return tensor_to(self, *args, **kwargs)

    tensor_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    # Plain assignment would not pass a type checker: these are C slots of torch.
    for owner, name, replacement in (
        (torch.Tensor, "to", to),
        (torch.Tensor, "type", type_name),
        (torch.Tensor, "cuda", _identity),
        (torch.Tensor, "pin_memory", _identity),
        (torch.nn.Module, "cuda", _identity),
    ):
        setattr(owner, name, replacement)
