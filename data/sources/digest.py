"""Digests of data files, remembered so that a warm start does not read the data again.

A remembered digest counts only for the same path, size, inode and times of change. Of the times that of
the system (ctime) cannot be set back, as a copy that keeps times does with the other. It also counts
only if the file was not written within a moment of being digested: a later write could leave all the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError

_MEMORY = "digests.json"
_SETTLED_NS = 2_000_000_000


def digest_files(paths: Sequence[Path], memory_dir: Path | None) -> str:
    """One hash of the contents of all files, in their order.

    Args:
        paths: The files.
        memory_dir: Folder that remembers digests; None to read every file.

    Raises:
        DataError: a file cannot be read.
    """
    return hashlib.sha256("\n".join(file_digests(paths, memory_dir)).encode()).hexdigest()


def file_digests(paths: Sequence[Path], memory_dir: Path | None) -> list[str]:
    """The hash of the contents of each file; arguments and errors of ``digest_files``."""
    memory = _load(memory_dir)
    changed = False
    digests = []
    for path in paths:
        try:
            stat = path.stat()
            identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known: Any = memory.get(str(path.resolve()))
            # Versions that knew no ctime wrote, and read, the digest in this place.
            fits = isinstance(known, list) and len(known) == 5 and isinstance(known[3], str)
            if fits and [*known[:3], *known[4:]] == [*identity, stat.st_ctime_ns]:
                digests.append(known[3])
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}).") from error
        digests.append(digest)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            memory[str(path.resolve())] = [*identity, digest, stat.st_ctime_ns]
            changed = True
    if changed and memory_dir is not None:
        _store(memory_dir, memory)
    return digests


def _load(memory_dir: Path | None) -> dict[str, Any]:
    if memory_dir is None:
        return {}
    try:
        memory = json.loads((memory_dir / _MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _store(memory_dir: Path, memory: dict[str, Any]) -> None:
    # Only a help: a folder that cannot be written is reported when the cache is.
    with contextlib.suppress(OSError):
        memory_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory_dir, delete=False) as file:
            json.dump(memory, file)
        os.replace(file.name, memory_dir / _MEMORY)
