"""What the ranks of a job tell each other: small files in a hidden folder that all nodes share.

N        what rank N is doing; when an alarm is raised, also where its main thread stands
alarm    some rank made no progress for too long: everyone tells where it stands
ended    why the job ends; whoever makes this file prints the message, so that one does
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from post_training.machine.processes import is_running, this_host

PREFIX = ".watchdog-"
ENDED = "ended"
"""The phase of a rank that has ended by itself."""


class RankFiles:
    """The files of one job, as one rank writes and reads them."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.alarm, self.ended = folder / "alarm", folder / "ended"
        self._own = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT, 0o644)

    def note(self, phase: str, **more: Any) -> None:
        """Say what this rank is doing; a full disk is not for this to complain of."""
        text = json.dumps({"phase": phase, "host": this_host(), "pid": os.getpid()} | more)
        with contextlib.suppress(OSError):
            if self._own >= 0:
                os.pwrite(self._own, f"{text}\n".encode(), 0)  # a reader never sees it empty
                os.ftruncate(self._own, len(text.encode()) + 1)

    def read(self, rank: int) -> dict[str, Any]:
        """What a rank wrote; nothing where it cannot be read."""
        return read_facts(self.folder / str(rank))

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has said that it ends by itself. A missing file is no word of an end."""
        return bool(self.read(rank).get("phase") == ENDED)

    def claim(self, reason: str) -> bool:
        """Whether this rank is the one that says why the job ends."""
        try:
            with self.ended.open("x") as file:
                file.write(reason)
        except FileExistsError:
            return False
        except OSError:
            return True  # whatever the disk does, it is told
        return True

    def leave(self) -> None:
        """Say that this rank has ended by itself; the last one removes the folder."""
        self.note(ENDED)
        os.close(self._own)  # over NFS others may see it only now
        self._own = -1
        if all(self.has_ended(rank) for rank in range(self.world)):
            shutil.rmtree(self.folder, ignore_errors=True)


def remove_left_over(output: Path) -> None:
    """Remove what jobs have left in an output folder that are gone, as far as this machine can know.

    A job ends when one of its ranks is gone; one that has no process here may run elsewhere.
    """
    for folder in output.glob(f"{PREFIX}*"):
        states = [read_facts(file) for file in folder.iterdir() if file.name.isdigit()]
        here = [state["pid"] for state in states if state.get("host") == this_host()]
        if here and not any(is_running(pid) for pid in here):
            shutil.rmtree(folder, ignore_errors=True)


def read_facts(file: Path) -> dict[str, Any]:
    """What a process has written of itself in the first line of a file; nothing where it cannot be read."""
    try:
        found = json.loads(file.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}
