"""The second, marked rendering of a conversation, and the proof that it is the first one.

Marks stand around everything that anybody said. Taking them out must give the first rendering back,
character by character, and every mark must have come out, in order; then their places are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from data.errors import RowError
from data.masking.refusals import question_dropped
from data.rows.conversation import Message
from data.templates.marks import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    BLOCK_CLOSE,
    BLOCK_OPEN,
    OTHER_CLOSE,
    OTHER_OPEN,
    Piece,
    Span,
    mark_conversation,
    split_marks,
)
from data.templates.template import ChatTemplate


class MarkedRendering(NamedTuple):
    """What marks told about a conversation.

    Attributes:
        pieces: The assistant's pieces that came out.
        spans: Where each of them stands in the text.
        others: Where the text of other roles stands.
    """

    pieces: list[Piece]
    spans: list[Span]
    others: list[Span]


def render_marked(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    text: str,
    may_drop_before: int,
) -> MarkedRendering:
    """Render once more with marks, and check that nothing else changes.

    Args:
        template: The template.
        messages: The messages, in the forms that it wants.
        tools: The tools on offer.
        text: The rendering without marks.
        may_drop_before: Index of the message before which reasoning may be left out.

    Raises:
        RowError: the template treats marked text differently, or leaves some of it out.
    """
    problem = RowError("marks lost", "the template was not rendered")
    # Some templates look into what others said, or repeat the name of a called tool.
    for mark_others, mark_names in ((True, True), (True, False), (False, True)):
        marked, pieces = mark_conversation(messages, mark_others, mark_names)
        try:
            rendered = template.render(marked, tools)
            rendered = split_marks(rendered, BLOCK_OPEN, BLOCK_CLOSE)[0]
            plain, spans, others = split_two_kinds(rendered)
        except RowError as error:
            problem = error
            continue
        if plain != text:
            problem = RowError("marks change the text", _first_difference(plain, text))
            continue
        try:
            pieces = _match_in_any_order(pieces, [text[a:b] for a, b in spans], may_drop_before)
            if not mark_names:
                _require_marked_calls(messages)
            for before, after in pairwise(zip(pieces, spans, strict=True)):
                inside = any(before[1][1] <= begin < after[1][0] for begin, _ in others)
                if inside and before[0].message == after[0].message:
                    what = f"the template writes others' text inside message {after[0].message + 1}"
                    raise RowError("marks lost", what)
            if mark_others:
                _require_others(messages, [text[a:b] for a, b in others])
        except RowError as error:
            if error.reason != "marks lost":
                raise
            problem = error
            continue
        silent = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
        silent -= {piece.message for piece in pieces}
        if silent:
            where = f"message {min(silent) + 1} comes out without a mark"
            problem = RowError("answer dropped", where)
            continue
        return MarkedRendering(pieces, spans, others)
    raise problem


def split_two_kinds(marked: str) -> tuple[str, list[Span], list[Span]]:
    """The text without any marks, and in it the character spans of answer marks and of other marks.

    Raises:
        RowError: marks are lost, doubled or nested.
    """
    alike = marked
    for mark in (ANSWER_CLOSE, OTHER_OPEN, OTHER_CLOSE):
        alike = alike.replace(mark, ANSWER_OPEN)  # one character is found faster than one of four
    texts = alike.split(ANSWER_OPEN)
    if len(texts) % 2 == 0:
        raise RowError("marks lost", "the template cuts a message's text")
    kinds: dict[str, list[Span]] = {ANSWER_OPEN + ANSWER_CLOSE: [], OTHER_OPEN + OTHER_CLOSE: []}
    at = 0
    for number in range(0, len(texts) - 1, 2):
        begin = at + len(texts[number])
        at = begin + len(texts[number + 1])
        pair = marked[begin + number] + marked[at + number + 1]
        if pair not in kinds:
            raise RowError("marks lost", "the template cuts or nests a message's text")
        kinds[pair].append((begin, at))
    answers, others = kinds.values()
    return "".join(texts), answers, others


def _require_marked_calls(messages: Sequence[Message]) -> None:
    """See that the last call of each message has a mark although names have none.

    Raises:
        RowError: one has no arguments, so nothing tells where it ends.
    """
    for number, message in enumerate(messages, 1):
        last = message["tool_calls"][-1]["function"] if message.get("tool_calls") else None
        if last is not None and not last["arguments"]:
            raise RowError(
                "marks lost",
                f"the call of {last['name']!r} in message {number} has no arguments, and the "
                "template repeats its name: where the call ends cannot be told",
            )


def _require_others(messages: Sequence[Message], texts: list[str]) -> None:
    """See that what all but the assistant say came out, once for every time that it was said.

    Raises:
        RowError: a message is missing.
    """
    said_by_others = [m.get("content") for m in messages if m["role"] != "assistant"]
    if texts == [
        content.strip() if isinstance(content, str) else None for content in said_by_others
    ]:
        return  # nearly always
    left = Counter(texts)
    missing: list[tuple[int, Message]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            continue
        content = message.get("content")
        parts = [{"text": content}] if isinstance(content, str) else content or []
        for part in parts:
            said = part["text"].strip() if isinstance(part.get("text"), str) else ""
            if said and not left[said]:
                missing.append((number, message))
            left[said] -= 1
    # A result that is written as JSON comes out under another spelling.
    rewritten = sum(count for count in left.values() if count > 0)
    if len(missing) > rewritten:
        raise question_dropped(*missing[0])


def _match_in_any_order(pieces: list[Piece], texts: list[str], may_drop_before: int) -> list[Piece]:
    """As `_match`, for templates that write calls behind the content or before it."""
    try:
        return _match(pieces, texts, may_drop_before)
    except RowError as error:
        before = {"reasoning": 0, "tool": 1, "content": 2}
        other = sorted(pieces, key=lambda piece: (piece.message, before[piece.kind]))
        if error.reason == "reasoning dropped" or other == pieces:
            raise
        try:
            return _match(other, texts, may_drop_before)
        except RowError:
            raise error from None


def _match(pieces: list[Piece], texts: list[str], may_drop_before: int) -> list[Piece]:
    """Pair the pieces that were marked with the texts that came out; nothing may be missing.

    Reasoning of messages before ``may_drop_before`` may be.
    """
    matched: list[Piece] = []
    dropped: list[Piece] = []
    rest = iter(pieces)
    for text in texts:
        for piece in rest:
            if piece.came_out_as(text):
                matched.append(piece)
                break
            dropped.append(piece)
        else:
            raise RowError("marks lost", f"the template moves or repeats {text[:40]!r}")
    dropped += rest
    for piece in dropped:
        if piece.kind != "reasoning":
            what = "a tool call" if piece.kind == "tool" else piece.kind
            raise RowError(
                "answer dropped",
                f"the template leaves out {what} of message {piece.message + 1}: "
                f"{(piece.text or '')[:60]!r}; --chat-template FILE gives one that writes it",
            )
    for piece in dropped:
        if piece.message >= may_drop_before:
            raise RowError(
                "reasoning dropped",
                f"the template leaves out the reasoning of message {piece.message + 1}; "
                "give a template that keeps it, or train only the last turn's (--reasoning last)",
            )
    return matched


def _first_difference(found: str, expected: str) -> str:
    at = 0
    while at < min(len(found), len(expected)) and found[at] == expected[at]:
        at += 1
    return (
        f"at character {at} the template writes {found[at : at + 40]!r} for a marked and "
        f"{expected[at : at + 40]!r} for the plain conversation"
    )
