"""Rows in, conversations out: one small converter for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.conversation import Conversation
from data.errors import DataError, RowError

Row = Mapping[str, Any]
Converter = Callable[[Row], Conversation]

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {"developer": "system", "human": "user", "gpt": "assistant", "function": "tool"}

# Columns of one question and its answer, the first pair that a row has.
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query", "problem")
ANSWER_COLUMNS = ("answer", "response", "output", "completion", "solution")


def messages_row(row: Row) -> Conversation:
    """OpenAI ``messages``.

    Raises:
        RowError: something in the row is of a wrong type, or a role is unknown.
    """
    raw = row.get("messages")
    if not isinstance(raw, list):
        raise RowError("bad messages", f"'messages' is {type(raw).__name__}, expected a list")
    messages = []
    for number, item in enumerate(raw, 1):
        if not isinstance(item, Mapping):
            raise RowError(
                "bad messages", f"message {number} is {type(item).__name__}, not an object"
            )
        role = str(item.get("role", "")).lower()
        role = _ROLE_NAMES.get(role, role)
        if role not in ROLES:
            raise RowError(
                "unknown role",
                f"message {number} has role {item.get('role')!r}; known: {', '.join(ROLES)}",
            )
        content = item.get("content")
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise RowError(
                "bad content", f"content of message {number} is {type(content).__name__}"
            )
        messages.append(
            {**{k: v for k, v in item.items() if v is not None}, "role": role, "content": content}
        )
    return _checked(Conversation(messages, row.get("tools") or None))


def question_row(row: Row) -> Conversation:
    """A question column and an answer column.

    Raises:
        RowError: a column is missing or not text.
    """
    question = next((name for name in QUESTION_COLUMNS if row.get(name) is not None), None)
    answer = next((name for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if question is None or answer is None:
        raise RowError(
            "missing column", f"columns {', '.join(map(str, row))}: no question or no answer"
        )
    messages = []
    for role, name in (("user", question), ("assistant", answer)):
        text = row[name]
        if not isinstance(text, str):
            raise RowError(
                "bad content", f"column {name!r} is {type(text).__name__}, expected text"
            )
        messages.append({"role": role, "content": text})
    extra = row.get("input")
    if question == "instruction" and isinstance(extra, str) and extra:
        messages[0]["content"] += "\n" + extra
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _checked(Conversation(messages))


def _checked(conversation: Conversation) -> Conversation:
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise RowError("no assistant turn", "nothing in this conversation can be trained")
    return conversation


FORMATS: dict[str, Converter] = {"messages": messages_row, "question": question_row}


def detect_format(row: Row) -> str:
    """The name of the format that a first row is in.

    Raises:
        DataError: no format fits; the message names the columns.
    """
    if "messages" in row:
        return "messages"
    if any(name in row for name in QUESTION_COLUMNS) and any(
        name in row for name in ANSWER_COLUMNS
    ):
        return "question"
    raise DataError(
        f"cannot tell the format of rows with columns {', '.join(map(str, row))}. Expected "
        f"'messages', or one of {', '.join(QUESTION_COLUMNS)} "
        f"with one of {', '.join(ANSWER_COLUMNS)}."
    )
