"""Which ranks have come as far as the process group, before there is one to ask them through.

Each rank leaves a file in a hidden folder of the output folder, which all nodes share, when it has its
data and goes to meet the others, and removes it once they have met.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import psutil

from post_training.processes import is_running, this_host

FOLDER = ".arrived"
# Seconds between the starts of the processes of one job. An older file on another machine is left over.
SPREAD = 600.0


def arrive(output: Path, rank: int) -> None:
    """Say that this rank is there."""
    with suppress(OSError):  # what a full disk has to say is said elsewhere
        (output / FOLDER).mkdir(exist_ok=True)
        text = json.dumps({"host": this_host(), "pid": os.getpid()})
        (output / FOLDER / str(rank)).write_text(text)


def leave(output: Path, rank: int) -> None:
    """Remove what this rank has written: all have met."""
    with suppress(OSError):
        (output / FOLDER / str(rank)).unlink()
        (output / FOLDER).rmdir()  # by the last one


def missing(output: Path, world: int) -> list[int]:
    """Ranks that have not arrived, as far as files can tell."""
    return [rank for rank in range(world) if not _is_there(output / FOLDER / str(rank))]


def _is_there(file: Path) -> bool:
    try:
        state = json.loads(file.read_text())
        if state["host"] == this_host():
            return is_running(state["pid"])
        oldest = psutil.Process().create_time() - SPREAD
        return file.stat().st_mtime > oldest
    except (OSError, ValueError, KeyError):
        return False
