"""`torch.compile` where it cannot work, or is not worth its seconds: functions stay as they are.

Upstream: megatron-core 0.19.2, `core/jit.py` decorates its fused element-wise functions with
`torch.compile`, and on CUDA `training/initialize.py` calls them before the first step. On CPU the first
call would start a C++ compiler for each of them, for kernels that no CPU run uses. On CUDA Triton (3.6 to
3.8, `triton/runtime/build.py`) builds modules of C: without a compiler or Python's headers, as in many
images made for running, the call raises.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def what_is_missing() -> str | None:
    """What Triton needs to build a kernel and does not find here, in words; None where it finds all."""
    if find_spec("triton") is None:
        return "the package triton"
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named is not None else ["gcc", "clang"])):
        return (
            "a C compiler (gcc, clang or the one that CC names)" if named is None else f"CC={named}"
        )
    # Debian's scheme for what pip installs has another folder than Python's own headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    return None if header.is_file() else f"{header} (the package python3-dev)"


def _uncompiled(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Return the function itself, or a decorator that does."""
    if model is None:
        return lambda function: function
    return model


def apply() -> None:
    """Make `torch.compile` return what it is given."""
    setattr(torch, "compile", _uncompiled)  # noqa: B010
