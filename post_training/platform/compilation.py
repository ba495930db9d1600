"""`torch.compile` at import time costs seconds on CPU and compiles kernels no CPU run uses.

Upstream: megatron-core 0.19.2, `core/jit.py` decorates its fused element-wise functions with
`torch.compile`; on CPU the first call would start a C++ compiler for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _uncompiled(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Return the function itself, or a decorator that does."""
    if model is None:
        return lambda function: function
    return model


def apply() -> None:
    """Make `torch.compile` return what it is given."""
    setattr(torch, "compile", _uncompiled)  # noqa: B010
