"""Data files: finding them by files, folders and globs, and opening them, compressed ones too."""

from __future__ import annotations

import glob
import gzip
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data.errors import DataError

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst")


def resolve_files(files: Sequence[str], flag: str = "--finetune-data-files") -> list[Path]:
    """Expand files, folders and globs, in a stable order, each file once.

    As in a shell's globs, what is hidden within a folder (`.ipynb_checkpoints`) is left out.

    Raises:
        DataError: something does not exist, matches nothing, is empty, or has an unknown suffix.
    """
    found: list[Path] = []
    known = ", ".join(FORMATS) + " (also with .gz or .zst)"
    for name in files:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if file_format(p) in FORMATS and p.is_file() and not _is_hidden(p.relative_to(path))
            )
            if not inside:
                raise DataError(f"{flag} {name}: the folder holds no file of type {known}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not any(match.is_file() for match in matches):
                raise DataError(f"{flag} {name}: no such file, folder or pattern. Check the path.")
            found += [match for match in matches if match.is_file()]
    for path in found:
        if file_format(path) not in FORMATS:
            raise DataError(f"{flag} {path}: unknown file type; known are {known}.")
        if path.stat().st_size == 0:
            raise DataError(f"{flag} {path}: the file is empty. Remove it or give another.")
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def compressed_format(path: Path) -> str:
    """How the bytes of a file are read, such as ``.jsonl.gz``."""
    suffix = path.suffix.lower()
    return file_format(path) + (suffix if suffix in COMPRESSIONS else "")


def file_format(path: Path) -> str:
    """The suffix that says what a file holds: that of its name without a suffix of compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, taken out of its compression.

    Raises:
        ValueError, OSError, EOFError: it is damaged, or cut short.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        try:
            with gzip.open(path, "rb") as stream:
                yield stream  # type: ignore[misc]
        except gzip.zlib.error as error:  # type: ignore[attr-defined]
            raise ValueError(str(error)) from error
    elif suffix == ".zst":
        import pyarrow

        # Arrow's reader goes on from frame to frame, and fails where the file ends inside of one.
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield stream
    else:
        with path.open("rb") as stream:
            yield stream


@contextmanager
def open_seekable(path: Path) -> Iterator[Path | IO[bytes]]:
    """A file that can be read from any place: itself, or its contents where it is compressed."""
    if path.suffix.lower() not in COMPRESSIONS:
        yield path
        return
    with tempfile.TemporaryFile() as whole:
        with open_file(path) as stream:
            shutil.copyfileobj(stream, whole, 1 << 20)
        yield whole
