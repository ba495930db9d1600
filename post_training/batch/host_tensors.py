"""Tensors that are made on the host and used on the GPU, without the GPU being waited for.

A small tensor made on the GPU from numbers of the host, or one whose size is only known there
(`torch.nonzero`), stops the host until all kernels launched before have run. Once a micro batch, that
empties the queue of the GPU each time. So micro batches are put together on the host.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_twins: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()


def host_group(group: ProcessGroup) -> ProcessGroup:
    """The ranks of `group`, for collectives of tensors on the host; NCCL carries none of them.

    Args:
        group: a process group; all its ranks must call this in the same order.

    Returns:
        `group` itself where its backend is gloo, else a gloo group of its ranks, made at the first call.
    """
    if torch.distributed.get_backend(group) == "gloo":
        return group
    if group not in _twins:
        twin: Any = torch.distributed.new_group(
            torch.distributed.get_process_group_ranks(group),
            backend="gloo",
            # Other groups' ranks need not come.
            use_local_synchronization=True,
        )
        _twins[group] = twin  # not the number that stands for no member: this rank is one
    return _twins[group]


def to_device(value: Any, device: torch.device) -> Any:
    """Copy what holds tensors to a device; the host does not wait for the copies.

    Args:
        value: a tensor on the host, a dataclass with such tensors among its fields (however deep), or
            anything else, which is returned as it is.
        device: where the model is.

    Returns:
        The same kind of object. A tensor that is named twice is copied once. On a CPU, `value` itself.
    """
    return value if device.type == "cpu" else _copied(value, device, {})


def _copied(value: Any, device: torch.device, done: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in done:
            # From memory that may be paged out CUDA copies only when its queue is empty.
            pinned = value.pin_memory() if device.type == "cuda" else value
            done[id(value)] = pinned.to(device, non_blocking=True)
        return done[id(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{
                field.name: _copied(getattr(value, field.name), device, done)
                for field in dataclasses.fields(value)
            },
        )
    return value
