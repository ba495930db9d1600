"""The kind of device this process trains on."""

from __future__ import annotations

import os
import sys

import torch


def device_type() -> str:
    """The type of device this run trains on: `"cuda"` where torch sees one, else `"cpu"`.

    `SFT_DEVICE` says it where a run is checked and its data prepared on a machine without GPUs.
    """
    return os.environ.get("SFT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def current_device() -> torch.device:
    """Where this rank computes and exchanges tensors."""
    if device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def warn_once(message: str) -> None:
    """Print a warning in one process of each machine, before ranks know each other."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)
