"""One training run at a time in an output folder: rank 0 holds a lock on a file in it.

The kernel releases the lock when the process ends, however it ends, so that a killed run never blocks
the next one. `filelock` closes it in processes that are forked from this one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from post_training.errors import SetupError
from post_training.job.rank_files import read_facts
from post_training.machine.outcome import supervised
from post_training.machine.processes import is_running, this_host

FILE = ".lock"
# Seconds that a run may take to end after a supervisor has started its successor.
WAIT = 10.0
# The same where a scheduler has given a node up whose processes have not heard of it yet.
SUPERVISED_WAIT = 300.0
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, FileLock] = {}


def hold(args: argparse.Namespace, wait: float | None = None) -> None:
    """Hold the output folder on rank 0 until this process ends; `--eval-only` needs none.

    Does nothing where the folder does not exist yet, or is held already.

    Args:
        args: parsed arguments.
        wait: seconds given to a run that holds it to end; by default `WAIT`, or `SUPERVISED_WAIT`.

    Raises:
        SetupError: another run trains in the folder.
    """
    folder = Path(args.output_dir)
    if args.rank != 0 or args.eval_only or folder in _held or not folder.is_dir():
        return
    file = folder / FILE
    if wait is None:
        wait = SUPERVISED_WAIT if supervised() else WAIT
    lock = FileLock(file, timeout=wait, fallback_to_soft=False)  # a soft one outlives who is killed
    try:
        lock.acquire()
        taken = False
    except Timeout:
        taken = True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise SetupError(f"--output-dir {folder}: {FILE}: {error.strerror}") from error
        holder = read_facts(file)
        taken = holder.get("host") == this_host() and is_running(holder.get("pid", 0))
        if not taken:
            print(
                f"warning: the file system of {file} has no locks: nothing keeps a second run on another "
                f"machine from training in the same folder",
                file=sys.stderr,
            )
    if taken:
        holder = read_facts(file)
        who = (
            f" (process {holder['pid']} on {holder['host'].split()[0]})" if "host" in holder else ""
        )
        raise SetupError(
            f"--output-dir {folder}: another run{who} trains in this folder. Wait for it, end it (its "
            f"workers may outlive a launcher that was killed), or choose another folder"
        )
    _held[folder] = lock
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder is not named
        file.write_text(json.dumps({"host": this_host(), "pid": os.getpid()}))
