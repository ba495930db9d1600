"""Which machine this is, and whether a process of it runs."""

from __future__ import annotations

import os

import psutil

PARENT = os.getppid()
"""The process that started this one, before it can be gone: imported early."""


def this_host() -> str:
    """Machine and process namespace: process numbers mean the same within it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{os.uname().nodename} {namespace}".strip()


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; one that only waits for its parent does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
