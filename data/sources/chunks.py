"""Chunks of rows on their way to where they are tokenised: how they are packed, and parsed there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

from data.errors import RowError

Kind = Literal["lines", "rows", "arrow"]


class RawRow(NamedTuple):
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

    @property
    def file(self) -> str:
        """The file, or the name of the dataset, that it is in."""
        file, _, number = self.place.rpartition(":")
        return file if number.isdigit() else self.place.rpartition(", row ")[0]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one source, not parsed yet.

    Attributes:
        source: Number of the source.
        name: Its name, for messages.
        first: Number of the first row (of the first line, for ``lines``), from 0.
        kind: ``lines`` of JSON, pickled ``rows``, or an ``arrow`` stream.
        payload: The bytes.
    """

    source: int
    name: str
    first: int
    kind: Kind
    payload: bytes


def read_chunk(chunk: Chunk) -> Iterator[RawRow]:
    """Parse the rows of a chunk; a row that cannot be parsed carries its error."""
    if chunk.kind == "lines":
        yield from _parse_lines(chunk)
        return
    if chunk.kind == "rows":
        rows = pickle.loads(chunk.payload)  # noqa: S301 - made by dataset_chunks in this run
    else:
        import pyarrow

        with pyarrow.ipc.open_stream(chunk.payload) as stream:
            rows = _arrow_rows(stream.read_all())
    for offset, row in enumerate(rows):
        number = chunk.first + offset
        place = f"{chunk.name}, row {number + 1}"
        error = row if isinstance(row, RowError) else None
        yield RawRow(chunk.source, number, place, None if error else row, error)


def _parse_lines(chunk: Chunk) -> Iterator[RawRow]:
    for offset, line in enumerate(chunk.payload.split(b"\n")):
        if not line or line.isspace():
            continue
        number = chunk.first + offset
        place = f"{chunk.name}:{number + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError):
                detail = "nested too deeply"
            elif isinstance(error, UnicodeDecodeError):
                detail = f"not UTF-8 ({error.reason} at byte {error.start})"
            else:
                detail = str(error)[:200]
            problem = RowError("bad JSON", detail)
            yield RawRow(chunk.source, number, place, None, problem)
            continue
        yield RawRow(chunk.source, number, place, row)


def first_rows(chunks: Iterable[Chunk], most: int | None) -> Iterator[Chunk]:
    """Chunks with the first rows of a source, and no further ones; all where ``most`` is None."""
    left = most
    for chunk in chunks:
        if left is None:
            yield chunk
            continue
        chunk, count = _cut(chunk, left)
        yield chunk
        left -= count
        if not left:
            return


def _cut(chunk: Chunk, most: int) -> tuple[Chunk, int]:
    """At most so many rows of a chunk, and how many they are."""
    if chunk.kind == "lines":
        lines = chunk.payload.split(b"\n")
        rows = [at for at, line in enumerate(lines) if line and not line.isspace()]
        if len(rows) <= most:
            return chunk, len(rows)
        return replace(chunk, payload=b"\n".join(lines[: rows[most]])), most
    if chunk.kind == "rows":
        values = pickle.loads(chunk.payload)  # noqa: S301 - made by dataset_chunks in this run
        kept = list(islice(values, most))
        return replace(chunk, payload=pickled_rows(kept)), len(kept)
    import pyarrow

    with pyarrow.ipc.open_stream(chunk.payload) as stream:
        table = stream.read_all().slice(0, most)
    return replace(chunk, payload=arrow_bytes(table)), len(table)


def pickled_rows(rows: Iterable[Any]) -> bytes:
    """Rows on their way to a worker; one that is nested too deeply to be sent becomes its error."""
    rows = list(rows)
    try:
        return pickle.dumps(rows)
    except RecursionError:
        for index, row in enumerate(rows):
            try:
                pickle.dumps(row)
            except RecursionError:
                detail = "the row's values are nested too deeply"
                rows[index] = RowError("nested too deeply", detail)
        return pickle.dumps(rows)


def arrow_bytes(table: Any) -> bytes:
    """An Arrow table as a stream."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload: bytes = sink.getvalue().to_pybytes()
    return payload


def _arrow_rows(table: Any) -> list[Any]:
    """The rows of an Arrow table; a row with a value that Python cannot hold becomes its error."""
    import pyarrow

    # Text that is not UTF-8, a day after the year 9999, a time zone that nobody knows.
    faults = (ValueError, OverflowError, LookupError, pyarrow.ArrowException)
    try:
        rows: list[Any] = table.to_pylist()
    except faults:
        rows = [_arrow_row(table, index, faults) for index in range(len(table))]
    nested = [field.name for field in table.schema if pyarrow.types.is_nested(field.type)]
    for row in rows if nested else ():
        if not isinstance(row, RowError):
            row.update({name: _without_nulls(row[name]) for name in nested})
    return rows


def _without_nulls(value: Any) -> Any:
    """A copy without keys whose value is null: Arrow adds them to make all objects alike."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _arrow_row(table: Any, index: int, faults: tuple[type[Exception], ...]) -> Any:
    import pyarrow

    row = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except faults as error:
            # No format reads a date or a time, so the row is good without it.
            if pyarrow.types.is_temporal(column.type):
                continue
            return RowError("bad value", f"column {name!r} cannot be read ({str(error)[:150]})")
    return row
