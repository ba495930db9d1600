"""Reading sources, files on disk and datasets in memory, in chunks of rows.

A source is cut into chunks of raw bytes or Arrow batches, which cost next to nothing to make and to
send, and are parsed where they are tokenised. The cut depends on the data alone, so chunk k of a
second run is chunk k of the first, and a build can go on where it was killed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import batched, islice
from pathlib import Path
from typing import IO, Any

from data.errors import DataError, RowError
from data.sources.chunks import Chunk, arrow_bytes, pickled_rows
from data.sources.files import file_format, open_file, open_seekable
from data.sources.json_objects import json_layout, object_rows

CHUNK_BYTES = 1 << 19
CHUNK_ROWS = 1024
# Rows may hold pictures, of which so many would fill the memory of the workers.
_TABLE_BYTES = 1 << 25
# What the surrogateescape handler makes of bytes that are not UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def file_chunks(path: Path, source: int) -> Iterator[Chunk]:
    """Cut one file into chunks.

    Raises:
        DataError: the file as a whole cannot be read: damaged, or not what its suffix says.
    """
    kind = file_format(path)
    try:
        if kind == ".parquet":
            yield from _parquet_chunks(path, source)
        elif kind == ".csv":
            yield from _row_chunks(path, source, _csv_rows)
        elif kind == ".json" and (layout := json_layout(path)) != "lines":
            if layout == "object":
                yield from _numbered_chunks(path, source, object_rows(path))
            else:
                yield from _row_chunks(path, source, _json_rows)
        else:
            yield from _line_chunks(path, source)
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as {kind[1:]} ({message[:200]}). "
            "The file is damaged or of another type; write it again or leave it out."
        ) from error


def dataset_chunks(dataset: Any, name: str, source: int = 0) -> Iterator[Chunk]:
    """Cut a ``datasets.Dataset`` or a sequence of rows into chunks."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "features"):
        arrow = dataset.with_format("arrow")
        for first in range(0, len(dataset), CHUNK_ROWS):
            table = arrow[first : first + CHUNK_ROWS]
            yield from _table_chunks(table, name, source, first)
        return
    first = 0
    for rows in batched(dataset, CHUNK_ROWS):
        yield Chunk(source, name, first, "rows", pickled_rows(rows))
        first += len(rows)


def _table_chunks(table: Any, name: str, source: int, first: int) -> Iterator[Chunk]:
    """A table as one chunk, or as several where it is large."""
    pieces = max(1, min(len(table), -(-table.nbytes // _TABLE_BYTES)))
    rows = -(-len(table) // pieces)
    for at in range(0, len(table), max(1, rows)):
        piece = table.slice(at, rows)
        yield Chunk(source, name, first + at, "arrow", arrow_bytes(piece))


def _line_chunks(path: Path, source: int) -> Iterator[Chunk]:
    with open_file(path) as stream:
        rest, line = stream.read(3), 0
        rest = rest.removeprefix(b"\xef\xbb\xbf")
        while True:
            block = stream.read(CHUNK_BYTES)
            if not block:
                break
            block = rest + block
            cut = block.rfind(b"\n") + 1
            whole, rest = block[:cut], block[cut:]
            if whole:
                yield Chunk(source, str(path), line, "lines", whole)
                line += whole.count(b"\n")
        if rest:
            yield Chunk(source, str(path), line, "lines", rest)


def _row_chunks(
    path: Path, source: int, read: Callable[[Path, bool], Iterator[Any]]
) -> Iterator[Chunk]:
    """Chunks of a file whose rows are parsed here.

    A file with a record that is not UTF-8 or not valid CSV is read once more, now looking at each
    record for itself; it is rare, and the look would cost all others time.
    """
    done = 0
    try:
        for chunk in _numbered_chunks(path, source, read(path, False)):
            yield chunk
            done += 1
    except (UnicodeDecodeError, csv.Error):
        yield from islice(_numbered_chunks(path, source, read(path, True)), done, None)


def _numbered_chunks(path: Path, source: int, rows: Iterator[Any]) -> Iterator[Chunk]:
    for first, batch in enumerate(batched(rows, CHUNK_ROWS)):
        yield Chunk(source, str(path), first * CHUNK_ROWS, "rows", pickled_rows(batch))


def _text(raw: IO[bytes], careful: bool, newline: str | None = None) -> io.TextIOWrapper:
    """The text of a file; bytes that are not UTF-8 are an error, or lone surrogates if careful."""
    errors = "surrogateescape" if careful else "strict"
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors=errors, newline=newline)


def _json_rows(path: Path, careful: bool) -> Iterator[Any]:
    """Elements of a top-level array, read piece by piece."""
    decode, digits = json.JSONDecoder().raw_decode, None
    with open_file(path) as raw, _text(raw, careful) as stream:
        buffer, at, line, wanted = "", 0, 1, 1 << 16
        opened, commas, due = False, 0, 0

        def fail(what: str, more_lines: int = 0) -> DataError:
            return DataError(
                f"{path}:{line + more_lines}: not valid JSON ({what}). Fix the file; a "
                ".json file holds one array of rows, or one row on each line."
            )

        while True:
            block = stream.read(wanted)
            buffer, at = buffer[at:] + block, 0
            while True:
                while at < len(buffer) and buffer[at] in " \t\r\n,":
                    line += buffer[at] == "\n"
                    commas += buffer[at] == ","
                    at += 1
                if at == len(buffer):
                    break
                if not opened:
                    if buffer[at] != "[":
                        raise fail(f"it begins with {buffer[at : at + 20]!r}, expected '['")
                    opened, at = True, at + 1
                    continue
                if commas != (0 if buffer[at] == "]" else due):
                    wrong = "a comma is missing" if commas < due else "a comma too many"
                    raise fail(f"{wrong} before {buffer[at : at + 20]!r}")
                if buffer[at] == "]":
                    if (buffer[at + 1 :] + stream.read(1 << 16)).strip():
                        raise fail("something follows the closing ']'")
                    return
                try:
                    value, end = decode(buffer, at)
                except json.JSONDecodeError as error:
                    if block:
                        break  # the element may go on in the next block
                    raise fail(error.msg, buffer.count("\n", at, error.pos)) from error
                except RecursionError:
                    raise fail("nested too deeply") from None
                except ValueError as error:  # a number with more digits than Python reads
                    digits = RowError("bad JSON", str(error)[:200])
                    decode = json.JSONDecoder(parse_int=str).raw_decode  # finds the element's end
                    continue
                if end == len(buffer) and block:
                    break
                if digits is not None:
                    value, digits = digits, None
                    decode = json.JSONDecoder().raw_decode
                if careful and _ESCAPED_BYTE.search(buffer, at, end):
                    value = RowError("bad JSON", "not UTF-8")
                line += buffer.count("\n", at, end)
                commas, due = 0, 1
                yield value
                at = end
            if not block:
                raise fail("the file ends before the closing ']'")
            # Blocks grow with an unfinished element, so that a huge row is not parsed too often.
            wanted = max(1 << 16, len(buffer) - at)


def _csv_rows(path: Path, careful: bool) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)
    with open_file(path) as raw, _text(raw, careful, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: not valid CSV ({error}).") from error
        if any(map(_ESCAPED_BYTE.search, header)):
            raise DataError(f"{path}:1: the header is not UTF-8. Write the file as UTF-8.")
        if len(set(header)) != len(header):
            raise DataError(f"{path}:1: two columns have the same name: {', '.join(header)}.")
        line = reader.line_num
        while True:
            try:
                for record in reader:
                    if careful:
                        line = reader.line_num
                        if any(map(_ESCAPED_BYTE.search, record)):
                            yield RowError("bad CSV", f"not UTF-8, line {line}")
                            continue
                    if len(record) == len(header):
                        yield dict(zip(header, record, strict=True))
                    elif record:
                        detail = f"{len(record)} fields, the header has {len(header)}"
                        yield RowError("bad CSV", detail)
                    else:
                        yield RowError("bad CSV", "empty line")
                return
            except csv.Error as error:
                if not careful:
                    raise
                if str(error) == "unexpected end of data":
                    # The quote has swallowed all rows after it, so this is no matter of one row.
                    raise DataError(
                        f"{path}:{line + 1}: not valid CSV (a quote that is opened in this record "
                        "is never closed). Fix the file."
                    ) from error
                line = reader.line_num  # the reader goes on with the line after this one
                yield RowError("bad CSV", f"{error}, line {line}")


def _parquet_chunks(path: Path, source: int) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_seekable(path) as whole, pyarrow.parquet.ParquetFile(whole) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path}: two columns have the same name: {', '.join(names)}.")
            first = 0
            for batch in file.iter_batches(CHUNK_ROWS):
                table = pyarrow.Table.from_batches([batch])
                yield from _table_chunks(table, str(path), source, first)
                first += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
