"""Plain stand-ins for the parts of `torch.cuda` that Megatron calls without asking for a GPU.

Upstream: megatron-core 0.19.2 takes streams, events, memory statistics and device properties for
granted (`core/distributed/param_and_grad_buffer.py`, `training/utils/common_utils.py`).
`torch.cuda.is_available` keeps telling the truth: torch itself decides on it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


class HostStream:
    """A stream, or an event on one: the host runs in program order, so whatever was asked for is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0
        self._seconds = time.perf_counter()

    def _wait(self, other: object = None) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    wait = wait_stream = wait_event = synchronize = _wait

    def query(self) -> bool:
        """Whether all work is done, or the event has happened: always."""
        return True

    def record_event(self, event: HostStream | None = None) -> HostStream:
        """Record the time of day in `event` (a new one when None) and return it."""
        event = event or HostStream()
        event.record(self)
        return event

    def record(self, stream: object = None) -> None:
        """Remember the time of day."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: HostStream) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1000.0

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *args: object) -> None:
        return None


_STREAM = HostStream()


def _returning(value: Any) -> Callable[..., Any]:
    """A new function that takes anything and returns `value`.

    One for each name: torch's compiler, when it is imported, maps functions to rules by identity.
    """
    return lambda *args, **kwargs: value


def apply() -> None:
    """Replace the names of `torch.cuda` that Megatron calls on its way through `pretrain()`."""
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1
    )
    for name, value in {
        # Megatron passes the current device on to factories: as a torch.device it is "here".
        "current_device": CPU,
        # Model parallel groups are only made where at least one device is counted.
        "device_count": 1,
        "get_device_properties": properties,
        "get_device_capability": (0, 0),
        "get_device_name": "cpu",
        "current_stream": _STREAM,
        "default_stream": _STREAM,
        "memory_stats": defaultdict(int),
        "mem_get_info": (0, 0),
    }.items():
        setattr(torch.cuda, name, _returning(value))
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(torch.cuda, name, _returning(0))
    for name in (
        *("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect"),
        "reset_peak_memory_stats",
    ):
        setattr(torch.cuda, name, _returning(None))
    for name, replacement in (
        ("Stream", HostStream),
        ("Event", HostStream),
        ("stream", contextlib.nullcontext),
    ):
        setattr(torch.cuda, name, replacement)
