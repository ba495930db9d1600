"""Ids of tool calls, for templates that write them.

A call's id ties a result to its call; the caller's software makes it up, not the assistant. Much
data has none (ShareGPT, Glaive), or has those of another vendor, while some templates refuse to
render a call without an id, or with one that is not of their form. Such calls get an id that
follows from what is called, and their results the same one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal

from data.rows.conversation import Message

# ``as is``: the template renders calls without ids. ``needed``: it does not. ``nine``: it takes
# nothing but nine letters and digits, as Mistral's templates do.
CallIds = Literal["as is", "needed", "nine"]
_NINE = re.compile(r"[A-Za-z0-9]{9}\Z")


def with_call_ids(messages: Sequence[Message], ids: CallIds) -> list[Message]:
    """Messages in which every call has an id that the template takes, and every result its call's.

    Args:
        messages: The messages; not changed.
        ids: What the template takes.
    """
    if ids == "as is" or not any(message.get("tool_calls") for message in messages):
        return list(messages)
    renamed: dict[str, str] = {}
    waiting: list[str] = []  # calls without a result so far; results without an id are in order
    result: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            known = renamed.get(given) if given is not None else next(iter(waiting), None)
            if known is not None:
                message = {**message, "tool_call_id": known}
                waiting = [other for other in waiting if other != known]
        elif message.get("tool_calls"):
            calls = [
                {**call, "id": _id_of(call, f"{index}.{number}", ids)}
                for number, call in enumerate(message["tool_calls"])
            ]
            waiting = [call["id"] for call in calls]
            for old, new in zip(message["tool_calls"], calls, strict=True):
                if old.get("id") is not None:
                    renamed[old["id"]] = new["id"]
            message = {**message, "tool_calls": calls}
        result.append(message)
    return result


def _id_of(call: dict[str, Any], place: str, ids: CallIds) -> str:
    given: str | None = call.get("id")
    if given is not None and (ids == "needed" or _NINE.match(given)):
        return given
    # Letters and digits only, as vendors' own ids are; equal ids of the data stay equal.
    text = given or f"{place} {call['function']['name']} {call['function']['arguments']}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()[:9]
