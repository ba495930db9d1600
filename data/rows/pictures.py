"""Pictures in messages: typed parts, and columns beside messages whose parts only hold their places.

{"type": "image", "image": PICTURE}      also under "path", "bytes", "url" and "base64"
{"type": "image_url", "image_url": {"url": PICTURE}}          of OpenAI; a data: URI or a file
{"type": "image"}                        the next of --image-keys (images, image); also <image> in a text

A message with pictures keeps its parts in order; the pictures themselves stand in the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import RowError
from data.rows.columns import Columns
from data.rows.tool_calls import kind_of

IMAGE_COLUMNS = ("images", "image")
IMAGE_PARTS = ("image", "image_url", "input_image")
PLACE = "<image>"  # in texts of LLaVA and LLaMA-Factory
_SOURCES = ("image", "image_url", "path", "bytes", "url", "base64", "file")
# Stands where the column beside the messages has the picture.
FROM_COLUMN = object()


def picture_of(part: Columns) -> Any:
    """What an image part holds; `FROM_COLUMN` where that is nothing."""
    for name in _SOURCES:
        value = part.get(name)
        if isinstance(value, Mapping) and "url" in value:
            part.asked.update(_SOURCES)
            value = value["url"]
        if value is not None and value != "":
            part.asked |= {
                "detail",
                "path",
            }  # how closely a service looks; Arrow's name of the bytes
            encoded = name == "base64" and isinstance(value, str)
            return f"data:;base64,{value}" if encoded else value
    return FROM_COLUMN


def with_parts(messages: Any, pictures: Sequence[Any]) -> Any:
    """Messages with image parts in the place of `<image>`, if that stands once for each picture."""
    if not pictures or not isinstance(messages, list):
        return messages
    keys = ["value" if isinstance(m, Mapping) and "value" in m else "content" for m in messages]
    said = [
        m.get(k) if isinstance(m, Mapping) else None for m, k in zip(messages, keys, strict=True)
    ]
    if sum(text.count(PLACE) for text in said if isinstance(text, str)) != len(pictures):
        return messages
    return [
        {**message, key: _parts(text)} if isinstance(text, str) and PLACE in text else message
        for message, key, text in zip(messages, keys, said, strict=True)
    ]


def _parts(text: str) -> list[dict[str, str]]:
    first, *rest = text.split(PLACE)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def place(pictures: Sequence[Any], column: Sequence[Any] | None, where: str) -> list[Any]:
    """Pictures with those of the column in their places.

    Args:
        pictures: Of the parts, in their order.
        column: Pictures beside the messages; None where there is no such column.
        where: Name of the column, for messages.

    Raises:
        RowError: they do not fit.
    """
    wanted = sum(picture is FROM_COLUMN for picture in pictures)
    if column and not wanted:
        raise RowError(
            "pictures or sound",
            f"{where} holds some, and no image part (nor {PLACE} in a text) says where they belong; "
            f"--ignore-columns {where} trains the text alone",
        )
    if wanted != len(column or ()):
        if column is None:
            raise RowError("no picture", f"{wanted} image parts hold none, nor does {where}")
        raise RowError(
            "pictures do not fit",
            f"{where} holds {len(column)} pictures for {wanted} image parts without one of their own",
        )
    rest = iter(column or ())
    return [next(rest) if picture is FROM_COLUMN else picture for picture in pictures]


def column_pictures(
    row: Mapping[str, Any], keys: Sequence[str], named: bool
) -> tuple[list[Any] | None, str]:
    """The pictures in columns of a row, one after another; None without a column.

    Args:
        row: The row.
        keys: The columns.
        named: Whether a flag named them, so that each has to be there.

    Raises:
        RowError: a named column is not there.
    """
    found = [key for key in keys if key in row]
    if named and len(found) < len(keys):
        lacking = next(key for key in keys if key not in row)
        columns = ", ".join(map(str, list(row)[:20]))
        raise RowError(
            "missing column", f"no column {lacking!r} (--image-keys); the row has {columns}"
        )
    if not found:
        return None, " or ".join(keys)
    pictures: list[Any] = []
    for key in found:
        value = row[key]
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            if None in list(value):
                raise RowError("no picture", f"{key!r} is a list with {kind_of(None)} in it")
            pictures += value
        elif value is not None and value != "":
            pictures.append(value)
    return pictures, " ".join(map(str, found))
