"""A conversation, as every row becomes one, and the marked copy of it that templates render."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data.chat_template import ANSWER_CLOSE, ANSWER_OPEN, OTHER_CLOSE, OTHER_OPEN, Message

PieceKind = Literal["content", "reasoning", "tool"]

# Where messages keep reasoning; rows use the first, a template may read another.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_THINK_TAG = re.compile(r"(</?think>)")


@dataclass
class Conversation:
    """One training example.

    Attributes:
        messages: ``role`` and ``content`` and, where the data has them, ``reasoning_content``,
            ``tool_calls``, ``name``, ``tool_call_id``. Keys without a value are absent.
        tools: JSON schemas of the tools on offer, or None.
        trained: For each message, whether its text may be trained; only assistant messages are.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    trained: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.trained:
            self.trained = [message["role"] == "assistant" for message in self.messages]


def begin_of_last_turn(messages: Sequence[Message]) -> int:
    """Index of the first message of the last turn: all after the last question that was answered.

    Calls of tools and their results belong to the turn of the answer that they lead to.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    return max((i + 1 for i in range(last) if messages[i]["role"] == "user"), default=0)


@dataclass(frozen=True)
class Piece:
    """A stretch of text that the assistant wrote, as it was marked.

    Attributes:
        message: Index of its message.
        kind: What it is part of.
        text: The text between the marks, or None where the template will escape it.
    """

    message: int
    kind: PieceKind
    text: str | None


def mark_conversation(
    messages: Sequence[Message], mark_others: bool = True, mark_names: bool = True
) -> tuple[list[Message], list[Piece]]:
    """Copy messages with marks around every stretch of text.

    Marks stand inside surrounding white space and between ``<think>`` tags, so that templates which
    trim, or which cut reasoning out of the content, do the same with and without them.

    Args:
        messages: The messages; not changed.
        mark_others: Whether text of other roles is marked too.
        mark_names: Whether the names of called tools are.

    Returns:
        The marked copies, and the assistant's pieces in the order in which templates write them.
    """
    marked: list[Message] = []
    pieces: list[Piece] = []
    for index, message in enumerate(messages):
        copy = dict(message)
        if message["role"] == "assistant":
            reasoning = None
            for name in REASONING_FIELDS:
                if isinstance(message.get(name), str):
                    reasoning = message[name]
                    copy[name] = _mark(reasoning, index, "reasoning", pieces)
            content = message.get("content")
            # An empty turn is marked as well: its stop token is something to learn.
            silent = not reasoning and not message.get("tool_calls")
            if isinstance(content, str):
                silent = silent and not content.strip()
                copy["content"] = _mark_content(content, index, pieces, silent)
            elif isinstance(content, list):
                silent = silent and len(content) == 1
                copy["content"] = [_mark_part(part, index, pieces, silent) for part in content]
            if message.get("tool_calls"):
                copy["tool_calls"] = [
                    _mark_call(call, index, pieces, mark_names) for call in message["tool_calls"]
                ]
        elif mark_others and "content" in message:
            copy["content"] = _mark_other(message["content"])
        marked.append(copy)
    return marked, pieces


def split_thinking(content: str) -> tuple[str, str]:
    """Split content into the reasoning inside its think tags and what follows them."""
    before, _, rest = content.rpartition("</think>")
    return before.replace("<think>", "", 1).strip("\n"), rest.lstrip("\n")


def _wrap(text: str, opening: str, closing: str) -> str:
    inner = text.strip()
    if not inner:
        return text
    begin = len(text) - len(text.lstrip())
    return text[:begin] + opening + inner + closing + text[begin + len(inner) :]


def _mark(text: str, message: int, kind: PieceKind, pieces: list[Piece]) -> str:
    inner = text.strip()
    if inner:
        pieces.append(Piece(message, kind, inner))
    return _wrap(text, ANSWER_OPEN, ANSWER_CLOSE)


def _mark_content(text: str, message: int, pieces: list[Piece], silent: bool) -> str:
    if silent:
        pieces.append(Piece(message, "content", ""))
        return ANSWER_OPEN + ANSWER_CLOSE + text
    # Closing tags alone part nothing.
    only_closing = "<think>" not in text and not _THINK_TAG.sub("", text).strip()
    # A tag that is only talked about closes nothing: templates that cut there are found out.
    if "</think>" not in text or only_closing or not text.lstrip().startswith("<think>"):
        return _mark(text, message, "content", pieces)
    marked: list[str] = []
    parts = _THINK_TAG.split(text)
    last_close = max(i for i, part in enumerate(parts) if part == "</think>")
    for number, part in enumerate(parts):
        if part in ("<think>", "</think>"):
            marked.append(part)
        else:
            kind: PieceKind = "reasoning" if number < last_close else "content"
            marked.append(_mark(part, message, kind, pieces))
    return "".join(marked)


def _mark_part(part: Any, message: int, pieces: list[Piece], silent: bool) -> Any:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        silent = silent and not part["text"].strip()
        return {**part, "text": _mark_content(part["text"], message, pieces, silent)}
    return part


def _mark_call(
    call: dict[str, Any], message: int, pieces: list[Piece], mark_name: bool
) -> dict[str, Any]:
    nested = isinstance(call.get("function"), dict)
    function = dict(call["function"] if nested else call)
    arguments = function.get("arguments")
    if mark_name:
        function["name"] = _mark(function["name"], message, "tool", pieces)
    # Strings in the arguments are escaped on their way into the text, so only their place counts.
    before = len(pieces)
    function["arguments"] = _mark_leaves(arguments, message, pieces)
    if not mark_name and len(pieces) == before and isinstance(arguments, dict) and arguments:
        # Numbers cannot be marked, but their names can.
        pieces += [Piece(message, "tool", None)] * len(arguments)
        function["arguments"] = {
            _wrap(key, ANSWER_OPEN, ANSWER_CLOSE): value for key, value in arguments.items()
        }
    return {**call, "function": function} if nested else function


def _mark_leaves(value: Any, message: int, pieces: list[Piece]) -> Any:
    if isinstance(value, str) and value.strip():
        pieces.append(Piece(message, "tool", None))
        return _wrap(value, ANSWER_OPEN, ANSWER_CLOSE)
    if isinstance(value, dict):
        return {key: _mark_leaves(item, message, pieces) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_leaves(item, message, pieces) for item in value]
    return value


def _mark_other(content: Any) -> Any:
    if isinstance(content, str):
        return _wrap(content, OTHER_OPEN, OTHER_CLOSE)
    if isinstance(content, list):
        return [
            {**part, "text": _wrap(part["text"], OTHER_OPEN, OTHER_CLOSE)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    return content
