"""Plain stand-ins for the parts of `torch.cuda` that Megatron calls without asking for a GPU.

Upstream: megatron-core 0.19.2 takes streams, events, memory statistics and device properties for
granted (`core/distributed/param_and_grad_buffer.py`, `training/utils/common_utils.py`).
`torch.cuda.is_available` keeps telling the truth: torch itself decides on it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


class HostStream:
    """A stream on which everything has already happened: the host runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def wait_stream(self, stream: object) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record the time of day in `event` (a new one when None) and return it."""
        event = event or HostEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *args: object) -> None:
        return None


class HostEvent:
    """An event that holds the time of day at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: object = None) -> None:
        """Remember the time of day."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing is pending, so there is nothing to wait for."""

    def query(self) -> bool:
        """Whether the event has happened: always."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1000.0


_STREAM = HostStream()


@contextlib.contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


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
    replacements: dict[str, Any] = {
        # Megatron passes the current device on to factories: as a torch.device it is "here".
        "current_device": _returning(CPU),
        # Model parallel groups are only made where at least one device is counted.
        "device_count": _returning(1),
        "set_device": _returning(None),
        "get_device_properties": _returning(properties),
        "get_device_capability": _returning((0, 0)),
        "get_device_name": _returning("cpu"),
        "Stream": HostStream,
        "Event": HostEvent,
        "stream": _nothing,
        "current_stream": _returning(_STREAM),
        "default_stream": _returning(_STREAM),
        "set_stream": _returning(None),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "ipc_collect": _returning(None),
        "reset_peak_memory_stats": _returning(None),
        "memory_stats": _returning(defaultdict(int)),
        "memory_allocated": _returning(0),
        "max_memory_allocated": _returning(0),
        "memory_reserved": _returning(0),
        "max_memory_reserved": _returning(0),
        "mem_get_info": _returning((0, 0)),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
