"""Marks in rendered conversations: what puts them there, and what takes them out again.

Marks are Unicode noncharacters, which no valid text holds, no tokenizer needs, and no string filter
changes. They stand around what ``{% generation %}`` blocks write, and around any text that is marked
before rendering. Taking them out gives the plain text and, at the same time, the character spans
between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from data.errors import RowError
from data.rows.conversation import REASONING_FIELDS, Message

PieceKind = Literal["content", "reasoning", "tool"]
Span = tuple[int, int]

# Noncharacters U+FDD0..U+FDEF are reserved for internal use by Unicode itself.
ANSWER_OPEN, ANSWER_CLOSE = "\ufdd0", "\ufdd1"  # around what the assistant said
OTHER_OPEN, OTHER_CLOSE = "\ufdd2", "\ufdd3"  # around what anybody else said
BLOCK_OPEN, BLOCK_CLOSE = "\ufdd4", "\ufdd5"  # around a {% generation %} block
MARKS = ANSWER_OPEN + ANSWER_CLOSE + OTHER_OPEN + OTHER_CLOSE + BLOCK_OPEN + BLOCK_CLOSE
_THINK_TAG = re.compile(r"(</?think>)")


class Piece(NamedTuple):
    """A stretch of text that the assistant wrote, as it was marked.

    Attributes:
        message: Index of its message.
        kind: What it is part of.
        text: The text between the marks, or None where the template may escape it.
        escaped: That text then, before it is; None where it is the name of an argument.
    """

    message: int
    kind: PieceKind
    text: str | None
    escaped: str | None = None

    def came_out_as(self, text: str) -> bool:
        """Whether a text between marks is this piece."""
        if self.text is not None or self.escaped is None:
            return self.text in (text, None)
        # JSON may be inside JSON, and some templates escape quotes only: backslashes may differ.
        spelled = {self.escaped, *(json.dumps(self.escaped, ensure_ascii=a) for a in (True, False))}
        bare = {each.replace("\\", "").strip('"') for each in spelled}
        return text.replace("\\", "").strip('"') in bare


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


def split_marks(marked: str, opening: str, closing: str) -> tuple[str, list[Span]]:
    """Take one kind of marks out of a rendering.

    Args:
        marked: Rendered text.
        opening: The mark at which a span begins.
        closing: The mark at which it ends.

    Returns:
        The text without these marks, and the character spans in it that they enclosed.

    Raises:
        RowError: marks do not alternate, so something was cut, doubled or reordered.
    """
    if opening not in marked and closing not in marked:
        return marked, []
    pieces: list[str] = []
    spans: list[Span] = []
    length = 0
    parts = marked.split(opening)
    for number, part in enumerate(parts):
        inside, found, after = part.partition(closing)
        if bool(found) != bool(number) or closing in after:
            raise RowError("marks lost", "the template cuts, doubles or moves the assistant's text")
        if number:
            spans.append((length, length + len(inside)))
        pieces += (inside, after)
        length += len(inside) + len(after)
    return "".join(pieces), spans


def has_marks(text: str) -> bool:
    """Whether a text holds any of the characters that are used as marks."""
    return not text.isascii() and any(mark in text for mark in MARKS)


def _wrap(text: str, opening: str, closing: str) -> str:
    inner = text.strip()
    if len(inner) == len(text):
        return opening + text + closing if text else text
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
        pieces.append(Piece(message, "tool", None, value.strip()))
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
