"""The assistant's turns in a rendered text, and where inside them think blocks and reasoning end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from data.rows.conversation import REASONING_FIELDS, Message
from data.templates.marks import Piece, Span

# A block that the template opens, as in its generation prompt, before an answer without reasoning.
OPENED_THINK = re.compile(r"\s*<think>\n?(?!\s*</think>)")


class Turn(NamedTuple):
    """One assistant message in the rendered text.

    Attributes:
        message: Index of the message (the last one, where the template joins several).
        start: First character that the assistant writes.
        end: One past its last character, the stop included.
        reasoning_end: One past the reasoning and its closing tag, or None without reasoning.
        stopped: Whether the turn ends with a stop that the template wrote.
    """

    message: int
    start: int
    end: int
    reasoning_end: int | None = None
    stopped: bool = True


def is_plain(message: Message) -> bool:
    """Whether a message is nothing but text."""
    content = message["content"]
    return (
        isinstance(content, str)
        and "</think>" not in content
        and not message.get("tool_calls")
        and not any(message.get(name) for name in REASONING_FIELDS)
    )


def end_of_reasoning(
    text: str, found: Sequence[tuple[Piece, Span]], tokens: re.Pattern[str]
) -> int | None:
    """One past a turn's reasoning and its closing tag; None without reasoning.

    The closing tag is ``</think>``, or the first token that the template writes before the rest of the
    turn. What follows it, such as the recipient of a call, is the model's to write.

    Args:
        text: The rendered text.
        found: The turn's pieces, and where they stand.
        tokens: The tokenizer's added tokens.
    """
    reasoning = [span for piece, span in found if piece.kind == "reasoning"]
    if not reasoning:
        return None
    after = reasoning[-1][1]
    rest = [span[0] for piece, span in found if piece.kind != "reasoning" and span[0] >= after]
    limit = min(rest, default=len(text))
    closing = text.find("</think>", after, limit)
    if closing >= 0:
        return skip_space(text, closing + len("</think>"), limit)
    if not rest:
        return after
    token = tokens.search(text, after, limit)
    return skip_space(text, token.end(), limit) if token else limit


def skip(pattern: re.Pattern[str], text: str, start: int, limit: int) -> int:
    """One past what the pattern matches at ``start``; ``start`` where it does not match."""
    found = pattern.match(text, start, limit)
    return found.end() if found else start


def skip_space(text: str, begin: int, end: int) -> int:
    """The first character from ``begin`` on that is no white space; ``end`` without one."""
    inside = text[begin:end]
    return begin + len(inside) - len(inside.lstrip())
