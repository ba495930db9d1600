"""Where a token cache is built and how it appears: once, whole, whoever else is at it.

    <cache_dir>/<key>                    the cache: appears by one rename, complete
    <cache_dir>/<key>.lock               held by the process that builds it
    <cache_dir>/<key>.building-<machine> what it has so far

The lock keeps others waiting, so that a cache is built once. Nothing relies on it between machines,
because not every network file system has locks that work: each machine builds in a folder of its
own, the first to finish gives it the cache's name, and the others take that one. A build that was
killed is taken up where it stopped, on another machine from a copy.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from data.documents.cache_build import ALL_FILES, JOURNAL
from data.errors import DataError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def build_once(cache_dir: Path, key: str, build: Callable[[Path, Path], None]) -> Path:
    """The folder of a cache; it is built if it is not there.

    Args:
        cache_dir: Folder of caches.
        key: Name of this one.
        build: Called with the folder to build in, which may hold the finished shards of an earlier
            build, and the name to give it in the end.

    Raises:
        DataError: the folder cannot be written, or the build failed.
    """
    folder = cache_dir / key
    if folder.exists():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(str(cache_dir / f"{key}.lock")):
            if not folder.exists():  # another process may have built it meanwhile
                _build(cache_dir, key, build)
    except OSError as error:
        raise DataError(f"--data-cache-dir {cache_dir}: {error}.") from error
    return folder


def _build(cache_dir: Path, key: str, build: Callable[[Path, Path], None]) -> None:
    folder, own = cache_dir / key, cache_dir / f"{key}.building-{machine()}"
    try:
        _take_up(own, list(cache_dir.glob(f"{key}.building-*")))
        build(own, folder)
    except (OSError, DataError):
        if not folder.exists():
            raise
        # A machine that does not see our lock was faster. Its cache is ours, byte by byte.
    for leftover in cache_dir.glob(f"{key}.building-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _take_up(own: Path, found: list[Path]) -> None:
    """Copy the build that came farthest, if another machine left it.

    It may be going on there. Its files only grow, a line of the journal is written after what it
    tells of, and every shard is checked before it is used, so a copy is as good as its journal.
    """
    farthest = max(found, key=_progress, default=own)
    if farthest == own or _progress(farthest) <= _progress(own):
        return
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    with suppress(FileNotFoundError):  # published or taken away meanwhile
        for name in (JOURNAL, *ALL_FILES):  # the journal first: the others have at least its bytes
            shutil.copyfile(farthest / name, own / name)


def _progress(folder: Path) -> int:
    journal = folder / JOURNAL
    return journal.stat().st_size if journal.exists() else 0


def machine() -> str:
    """A name of this machine, as long as it runs: hosts in containers may share theirs."""
    boot = _BOOT_ID.read_text(encoding="ascii")[:8] if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()}-{boot}"
