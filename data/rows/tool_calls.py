"""Calls of tools in messages, in the shapes in which data has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import RowError
from data.rows.columns import Columns

ARGUMENT_FIELDS = ("arguments", "parameters", "input", "args")
_ID_FIELDS = ("id", "call_id", "tool_call_id")
# `type` says no more than that it is a call; `index` counts the calls of a message.
_WITHOUT_MEANING = ("type", "index")


def tool_calls(value: Any, number: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Calls as ``{"type", "id", "function": {"name", "arguments": object}}``.

    Args:
        value: A call, a list of calls, or the JSON text of either.
        number: Of the message, for messages.

    Returns:
        The calls, and the fields that nobody reads, such as ``call.custom``.

    Raises:
        RowError: one is no call.
    """
    if isinstance(value, str):
        value = from_json(value, "bad tool call", f"the call in message {number}")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError("bad tool call", f"the call in message {number} is {kind_of(value)}")
    calls, unread = [], []
    for item in value:
        if not isinstance(item, Mapping):
            raise RowError("bad tool call", f"a call in message {number} is {kind_of(item)}")
        call = Columns(item)
        call.asked.update(_WITHOUT_MEANING)
        inner = call.get("function")
        function = Columns(inner) if isinstance(inner, Mapping) else call
        name = inner if isinstance(inner, str) else function.get("name")
        if not isinstance(name, str) or not name:
            raise RowError("bad tool call", f"a call in message {number} has no function name")
        entry: dict[str, Any] = {"type": "function"}
        identity = next((call[key] for key in _ID_FIELDS if call.get(key) is not None), None)
        if isinstance(identity, (str, int)):
            entry["id"] = str(identity)
        arguments = _arguments(function, number)
        calls.append({**entry, "function": {"name": name, "arguments": arguments}})
        left = call.unread() + (function.unread() if function is not call else [])
        unread += [f"call.{key}" for key in left]
    if not calls:
        raise RowError("bad tool call", f"message {number} has an empty list of calls")
    return calls, unread


def _arguments(function: Columns, number: int) -> Mapping[str, Any]:
    given = {key: function[key] for key in ARGUMENT_FIELDS if function.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, str):
            # Some write no text at all for a call without arguments.
            what = f"{key} in message {number}"
            value = from_json(value, "bad tool call", what) if value.strip() else {}
            value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise RowError("bad tool call", f"{key} in message {number} are {kind_of(value)}")
        given[key] = value
    if len(given) > 1 and any(value != next(iter(given.values())) for value in given.values()):
        raise RowError(
            "bad tool call", f"a call in message {number} has both {' and '.join(given)}"
        )
    return next(iter(given.values()), {})


def from_json(text: str, reason: str, what: str) -> Any:
    """The value that a text holds.

    Raises:
        RowError: the text is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(reason, f"{what} is not valid JSON ({str(error)[:80]})") from error


def kind_of(value: Any) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else type(value).__name__
