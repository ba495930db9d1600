"""A .json file that is one object: rows under a name, columns, or one row, however it is spread over lines.

{"data": [{...}, {...}]}                 also rows, examples, instances and train
{"question": [...], "answer": [...]}     columns, as lists or, by pandas, as {"0": ..., "1": ...}
{"messages": [...]}                      one row
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sources.files import open_file

_ROWS = ("data", "rows", "examples", "instances", "train")


def json_layout(path: Path) -> str:
    """How a .json file is laid out: ``array``, ``object``, or ``lines``, one row on each."""
    with open_file(path) as stream:
        head = b""
        while not head.strip():
            line = stream.readline()
            if not line:
                return "lines"
            head = line.removeprefix(b"\xef\xbb\xbf")
        head = head.strip()
        if head.startswith(b"["):
            return "array"
        if not head.startswith(b"{"):
            return "lines"
        try:
            json.loads(head)
        except UnicodeDecodeError:
            return "lines"
        except json.JSONDecodeError as error:
            # What goes on in the next line breaks off at the line's end.
            return "object" if error.pos >= len(head.decode()) else "lines"
        except (ValueError, RecursionError):
            return "lines"
        # A row, or the whole file.
        return "lines" if any(map(bytes.strip, stream)) else "object"


def object_rows(path: Path) -> Iterator[Any]:
    """The rows of a file that is one object.

    Raises:
        DataError: it is not valid JSON, or what its rows are cannot be told.
    """
    with open_file(path) as stream:
        text = stream.read()
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise DataError(f"{path}: not valid JSON (nested too deeply). Fix the file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}). Write the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Fix the file; a .json file holds one "
            "array of rows, one row on each line, or one object."
        ) from error
    name = next((name for name in _ROWS if isinstance(value.get(name), list)), None)
    columns = _columns(value)
    if columns is not None:
        names = list(columns)
        yield from (
            dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )
    elif name is not None and all(isinstance(row, dict) for row in value[name]):
        other = [
            key for key, item in value.items() if key != name and isinstance(item, (list, dict))
        ]
        if other:
            raise DataError(
                f"{path}: {name!r} and {other[0]!r} both hold something; which are the rows cannot be "
                "told. Write the rows alone, as an array or one on each line."
            )
        yield from value[name]
    else:
        yield value


def _columns(value: dict[str, Any]) -> dict[str, list[Any]] | None:
    """The columns of an object that holds nothing else; None where it is something else."""
    items = list(value.values())
    numbered = [[str(n) for n in range(len(item))] for item in items if isinstance(item, dict)]
    if items and len(numbered) == len(items):
        same = all(list(item) == numbered[0] for item in items)
        return {k: list(v.values()) for k, v in value.items()} if same and numbered[0] else None
    if not items or not all(isinstance(item, list) for item in items):
        return None
    if len({len(item) for item in items}) != 1:
        return None
    # One row has lists too: of messages, of schemas and of token ids.
    cells = [cell for item in items for cell in item]
    lists_in_a_row = all(isinstance(cell, (dict, int)) for cell in cells)
    return None if lists_in_a_row else value
