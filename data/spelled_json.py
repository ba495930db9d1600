"""JSON whose numbers keep their spelling on the way from one text to another.

Arguments of a tool call are text that the assistant wrote. They are parsed, because templates want
objects, and written again by the template, with its own spacing. Numbers must not change on the way:
Python would write ``1e3`` as ``1000.0``, ``0.10`` as ``0.1``, and ``1e400`` as ``Infinity``.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Self

from data.errors import RowError

# A noncharacter, which no valid text holds, stands for such a number while JSON is written.
_PLACE = "\ufdd6"


class SpelledNumber(Decimal):
    """A number that Python would spell in another way.

    Args:
        text: Its spelling.
    """

    text: str

    def __new__(cls, text: str) -> Self:
        """A number with its spelling."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return (type(self), (self.text,))


def parse_spelled(text: str) -> Any:
    """Parse JSON; numbers that Python would spell in another way become ``SpelledNumber``.

    Raises:
        ValueError: not valid JSON.
        RecursionError: nested too deeply.
    """
    return json.loads(text, parse_float=_float, parse_int=_int)


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps`` with numbers as they were spelled.

    Args:
        value: What to write.
        options: Options of ``json.dumps``.

    Raises:
        RowError: the value holds a reserved character.
        TypeError: it holds something that JSON has no form for.
    """
    spelled: list[str] = []

    def spell(number: object) -> str:
        if not isinstance(number, SpelledNumber):
            raise TypeError(f"{type(number).__name__} cannot be written as JSON")
        spelled.append(number.text)
        return _PLACE

    text = json.dumps(value, default=spell, **options)
    if not spelled:
        return text
    place = json.dumps(_PLACE, ensure_ascii=options.get("ensure_ascii", True))
    pieces = text.split(place)
    if len(pieces) != len(spelled) + 1:
        raise RowError("reserved character", "the arguments of a tool call hold U+FDD6")
    return "".join(a + b for a, b in zip(pieces, [*spelled, ""], strict=True))


def _float(text: str) -> float | SpelledNumber:
    value = float(text)
    return value if repr(value) == text else SpelledNumber(text)


def _int(text: str) -> int | SpelledNumber:
    return SpelledNumber(text) if text == "-0" else int(text)
