"""One training run at a time in an output folder: rank 0 holds a lock on a file in it.

The kernel releases the lock when the process ends, however it ends, so that a killed run never blocks
the next one.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from post_training.errors import SetupError
from post_training.processes import is_running, this_host

FILE = ".lock"
# Seconds that a run may take to end after a supervisor has started its successor.
WAIT = 10.0
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, int] = {}


def _forget() -> None:
    # A forked process would keep the lock when this one is killed.
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def hold(args: argparse.Namespace, wait: float = WAIT) -> None:
    """Hold the output folder on rank 0 until this process ends; `--eval-only` needs none.

    Does nothing where the folder does not exist yet, or is held already.

    Args:
        args: parsed arguments.
        wait: seconds given to a run that holds it to end.

    Raises:
        SetupError: another run trains in the folder.
    """
    folder = Path(args.output_dir)
    if args.rank != 0 or args.eval_only or folder in _held or not folder.is_dir():
        return
    file = folder / FILE
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SetupError(f"--output-dir {folder}: {file.name}: {error.strerror}") from error
    deadline = time.monotonic() + wait
    while _is_taken(descriptor, file):
        if time.monotonic() >= deadline:
            os.close(descriptor)
            raise SetupError(f"--output-dir {folder}: {_told(file)}")
        time.sleep(0.1)
    text = json.dumps({"host": this_host(), "pid": os.getpid()})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{text}\n".encode(), 0)
    except OSError as error:  # a full disk: the lock holds, only its holder is not named
        print(f"{file}: {error.strerror}", file=sys.stderr)
    _held[folder] = descriptor


def _is_taken(descriptor: int, file: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise SetupError(f"{file}: {error.strerror}") from error
        holder = _holder(file)
        if holder.get("host") == this_host():
            return holder["pid"] != os.getpid() and is_running(holder["pid"])
        print(
            f"warning: the file system of {file} has no locks: nothing keeps a second run on another "
            f"machine from training in the same folder",
            file=sys.stderr,
        )
    return False


def _holder(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _told(file: Path) -> str:
    holder = _holder(file)
    who = "another run"
    if holder:
        who += f" (process {holder['pid']} on {holder['host'].split()[0]})"
    return (
        f"{who} trains in this folder. Wait for it, end it (its workers may outlive a launcher that was "
        f"killed), or choose another folder"
    )
