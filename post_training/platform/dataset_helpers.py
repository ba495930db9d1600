"""Megatron compiles its dataset helpers with a Makefile that the wheel does not carry.

Upstream: megatron-core 0.19.2, `core/datasets/utils.py`: `compile_helpers()` ends rank 0 when `make`
fails. The compiled extension is in the wheel, so there is nothing to compile when it imports.
"""

from __future__ import annotations

import importlib


def apply() -> None:
    """Make `compile_helpers()` do nothing where the compiled extension imports."""
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return
    from megatron.core.datasets import utils

    setattr(utils, "compile_helpers", lambda: None)  # noqa: B010
