"""A disk that fills up while a run is on: told in one message; log lines are not worth a rank's life."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Buffer, Iterator
from typing import TextIO

# The disk, a user's quota of it, and a limit on the size of one file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def system_errors(error: BaseException) -> Iterator[OSError]:
    """The errors of the system behind `error`, itself among them, the last first."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError):
            yield current
        current = current.__cause__ or current.__context__


def no_room(error: BaseException) -> OSError | None:
    """The system's error behind `error` that says that there is no room, or None where it is another."""
    return next((each for each in system_errors(error) if each.errno in NO_ROOM), None)


def tell_no_room(error: OSError, folder: str | None, rank: int, console: TextIO) -> int:
    """Say that this rank could not write, and return the exit status, 1.

    Args:
        error: as `no_room` gives it.
        folder: the output folder, once it is known.
        rank: of this process.
        console: where messages go.
    """
    where = error.filename or "a file"
    room = ""
    if folder is not None:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            room = f" ({free / 2**20:.1f} MiB free in {folder})"
    print(
        f"error on rank {rank}: {where} cannot be written: {error.strerror}{room}; complete checkpoints "
        f"are whole; make room and give the same command again",
        file=console,
        flush=True,
    )
    return 1


class _LogFile(io.FileIO):
    """Drops what a full disk has no room for."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return memoryview(data).nbytes


def log_stream(descriptor: int, *, owned: bool = False) -> TextIO:
    """A line-buffered stream for log lines, which a full disk shortens and does not break.

    Args:
        descriptor: an open file.
        owned: close it with the stream.
    """
    raw = _LogFile(descriptor, "wb", closefd=owned)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def room_reason(folder: str) -> str:
    """Why a write to `folder` ended early, where the one who wrote does not tell."""
    if shutil.disk_usage(folder).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return "a file was cut off while it was written, as by a quota or a limit on the size of files"
