"""Where documents come from: the file and row of each, and which of several sources it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data.documents.documents import Documents
from data.documents.mixture import DocumentSet
from data.errors import DataError
from data.sources.files import COMPRESSIONS, FORMATS, resolve_files


def document_place(documents: Documents | DocumentSet, index: int) -> str:
    """`FILE:LINE` or `FILE, row N` (from 1) of document `index`, for messages."""
    part, index = _part(documents, index)
    source, row = (int(number) for number in part.provenance[index])
    name = _files(part)[source]
    lines = ".jsonl" in Path(name).suffixes
    return f"{name}:{row + 1}" if lines else f"{name}, row {row + 1}"


def source_names(entries: Sequence[str]) -> list[str]:
    """Short names of sources, all different: the file's name where that is enough, else the whole entry.

    Args:
        entries: files, folders or globs as they were given.
    """
    short = [_short_name(entry) for entry in entries]
    return [
        name if short.count(name) == 1 else entry
        for name, entry in zip(short, entries, strict=True)
    ]


def _short_name(entry: str) -> str:
    path = Path(entry)
    while path.suffix in (*FORMATS, *COMPRESSIONS):
        path = path.with_suffix("")
    return entry if set("*?[") & set(path.name) else path.name or entry


def source_of(
    documents: Documents | DocumentSet, entries: Sequence[str]
) -> Callable[[int], int] | None:
    """A function from a document's index to the number of the entry that it came from.

    Args:
        documents: prepared from all the entries.
        entries: files, folders or globs as they were given, without weights.

    Returns:
        The function; None where there is one source only.
    """
    if len(entries) < 2:
        return None
    if isinstance(documents, DocumentSet) and len(documents.parts) == len(entries):
        parts = documents.part_of  # a mixture has a part for each entry
        return lambda index: int(parts[index])
    owner: dict[str, int] = {}
    for number, entry in enumerate(entries):
        for path in resolve_files([entry]):
            owner.setdefault(str(path), number)

    def look_up(index: int) -> int:
        part, at = _part(documents, index)
        name = _files(part)[int(part.provenance[at][0])]
        if name not in owner:
            raise DataError(f"{name}: the token cache holds a file that is not among those given.")
        return owner[name]

    return look_up


def _part(documents: Documents | DocumentSet, index: int) -> tuple[Documents, int]:
    if isinstance(documents, DocumentSet):
        part = documents.parts[int(documents.part_of[index])]
        return part, int(documents.index_of[index])
    return documents, index


def _files(part: Documents) -> list[str]:
    names: list[str] = part.report.get("sources") or ["rows"]
    return names
