"""Packages of CUDA kernels that Megatron takes wherever they import, whether or not they can work here.

Upstream: megatron-core 0.19.2 with Transformer Engine 2.20.

- Where one of them imports, gradient clipping (`core/optimizer/clip_grads.py`), the optimizers
  (`core/optimizer/__init__.py`) and the router (`core/transformer/moe/moe_utils.py`) call its kernels,
  with tensors of a CPU too, which the kernels do not take.
- To Megatron only an ImportError says that a package is not there. An incomplete Transformer Engine
  raises others (RuntimeError without the wheel of its core, OSError without a library of CUDA), or
  imports as `transformer_engine` but not as `transformer_engine.pytorch`, so that parts of Megatron use it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
APEX = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")


def hide(names: tuple[str, ...]) -> None:
    """Let every later import of these packages, and of what lies in them, be an ImportError."""
    for name in {*names, *(each for each in sys.modules if each.partition(".")[0] in names)}:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say so


def _why_broken() -> str | None:
    """Why Transformer Engine is installed but does not import; None where it does, or is not installed."""
    if find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # noqa: BLE001 - whatever it is, it cannot be used
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    return None


def apply() -> None:
    """Hide what cannot work: on a CPU all of them, on CUDA a Transformer Engine that does not import."""
    from post_training.machine.device import device_type, warn_once

    if device_type() == "cpu":
        hide(tuple(name for name in (*TRANSFORMER_ENGINE, *APEX) if name not in sys.modules))
        return
    reason = _why_broken()
    if reason is None:
        return
    hide(TRANSFORMER_ENGINE)
    warn_once(
        f"Transformer Engine is installed but does not import ({reason}): going on without it"
    )
