"""Where rows come from: files, folders and globs on disk, and HuggingFace datasets."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError, RowError

SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, or why it could not be.

    Attributes:
        source: Number of its source.
        number: Row number in the source, from 0.
        place: ``file:line`` or ``file, row n``, for messages.
        row: The row; None when ``error`` says why there is none.
        error: What is wrong with it.
    """

    source: int
    number: int
    place: str
    row: Any
    error: RowError | None = None


def resolve_files(files: Sequence[str], flag: str = "--finetune-data-files") -> list[Path]:
    """Expand files, folders and globs, in a stable order.

    Raises:
        DataError: something does not exist, matches nothing, or has an unknown suffix.
    """
    found: list[Path] = []
    for name in files:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
            if not inside:
                raise DataError(f"{flag} {name}: the folder has no {', '.join(SUFFIXES)} file.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"{flag} {name}: no such file, folder or pattern. Check the path.")
            found += [match for match in matches if match.is_file()]
    for path in found:
        if path.suffix not in SUFFIXES:
            raise DataError(f"{flag} {path}: unknown file type; known are {', '.join(SUFFIXES)}.")
        if path.stat().st_size == 0:
            raise DataError(f"{flag} {path}: the file is empty. Remove it or give another.")
    return found


def read_file(path: Path, source: int) -> Iterator[RawRow]:
    """Rows of one file, one at a time."""
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, source)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            if error.msg.startswith("Extra data"):
                yield from _read_jsonl(path, source)
                return
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from error
        if not isinstance(rows, list):
            rows = [rows]
        for number, row in enumerate(rows):
            yield RawRow(source, number, f"{path}, row {number + 1}", row)
    else:
        import pyarrow.parquet

        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                yield RawRow(source, number, f"{path}, row {number + 1}", row)
                number += 1


def _read_jsonl(path: Path, source: int) -> Iterator[RawRow]:
    number = 0
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{line_number}"
            try:
                yield RawRow(source, number, place, json.loads(line.decode("utf-8-sig")))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield RawRow(source, number, place, None, RowError("bad JSON", str(error)))
            number += 1
