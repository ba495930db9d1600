"""Rows that are no conversations: raw text, and rows that somebody has tokenised already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import RowError
from data.rows.columns import Columns, require_read, without
from data.rows.converters import FormatOptions

IGNORED_LABEL = -100
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class PlainRow:
    """What a row holds.

    Attributes:
        text: Its text, which is trained whole; empty where it has ids.
        ids: Its token ids.
        trained: Of each id, whether it is trained.
        unread: Columns that nobody reads.
    """

    text: str = ""
    ids: Sequence[int] = ()
    trained: Sequence[bool] = ()
    unread: tuple[str, ...] = ()


def text_row(row: Columns, options: FormatOptions) -> PlainRow:
    """``text``, or the column of ``--response-key``."""
    column = options.response_key or "text"
    text = row.get(column)
    if not isinstance(text, str):
        kind = type(text).__name__ if column in row else "missing"
        raise RowError("bad content", f"column {column!r} is {kind}, expected text")
    if not text:
        raise RowError("no content", f"column {column!r} is empty")
    return PlainRow(text=text)


def tokens_row(row: Columns, options: FormatOptions) -> PlainRow:
    """``input_ids`` with ``labels``, a mask of _MASKS, or neither; ``attention_mask`` cuts padding."""
    ids = _integers(row, "input_ids")
    flags = any(isinstance(token, bool) for token in ids or ())
    if not ids or flags or min(ids) < 0 or max(ids) >= 1 << 31:
        raise RowError("bad token ids", "'input_ids' is not a list of token ids")
    trained = [True] * len(ids)
    labels = _integers(row, "labels")
    if labels is not None:
        _require_length("labels", labels, ids)
        for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (token, IGNORED_LABEL):
                raise RowError(
                    "bad labels",
                    f"label {place} is {label}, expected {token}, the token there, or "
                    f"{IGNORED_LABEL}: labels are not shifted",
                )
        trained = [label != IGNORED_LABEL for label in labels]
    for name in _MASKS:
        mask = _integers(row, name)
        if mask is not None:
            _require_mask(name, mask, ids)
            trained = [a and bool(b) for a, b in zip(trained, mask, strict=True)]
    attended = _integers(row, "attention_mask")
    if attended is not None:
        _require_mask("attention_mask", attended, ids)
        kept = [place for place, value in enumerate(attended) if value]
        if not kept or kept[-1] - kept[0] + 1 != len(kept):
            raise RowError("bad mask", "'attention_mask' leaves out more than padding at the ends")
        inside = slice(kept[0], kept[-1] + 1)
        ids, trained = ids[inside], trained[inside]
    return PlainRow(ids=ids, trained=trained)


PLAIN_FORMATS: dict[str, Callable[[Columns, FormatOptions], PlainRow]] = {
    "text": text_row,
    "tokens": tokens_row,
}


def plain_row(name: str, row: Mapping[str, Any], options: FormatOptions) -> PlainRow:
    """What a row of a format of PLAIN_FORMATS holds.

    Raises:
        RowError: the row cannot be used.
    """
    columns = Columns(without(row, options.ignore_columns))
    found = PLAIN_FORMATS[name](columns, options)
    unread = require_read(columns.unread(), options.ignore_columns, options.strict_columns)
    return PlainRow(found.text, found.ids, found.trained, unread)


def _integers(row: Columns, name: str) -> list[int] | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise RowError("bad token ids", f"{name!r} is not a list of whole numbers")
    return value


def _require_length(name: str, values: Sequence[int], ids: Sequence[int]) -> None:
    if len(values) != len(ids):
        raise RowError(
            "bad mask", f"{name!r} has {len(values)} entries, 'input_ids' has {len(ids)}"
        )


def _require_mask(name: str, values: Sequence[int], ids: Sequence[int]) -> None:
    _require_length(name, values, ids)
    if not set(values) <= {0, 1}:
        raise RowError("bad mask", f"{name!r} holds other values than 0 and 1")
