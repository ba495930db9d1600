"""Which machine this is, and whether a process of it runs."""

from __future__ import annotations

import os
from pathlib import Path


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
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True  # another user's, or no /proc
    return state not in ("Z", "X")
