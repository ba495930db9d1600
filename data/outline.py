r"""A short cut that gives the proof of the second, marked rendering without rendering again.

Once a conversation has been told apart with marks, the text between its messages is known:

    outline   ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"]

The next conversation with the same roles is rendered once, without marks. If its text is exactly
this outline with its own messages put in, character by character, then each message stands where it
was put, which is what marks would have shown. If it is anything else, marks decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.chat_template import Message, Span
from data.conversation import REASONING_FIELDS


@dataclass(frozen=True)
class Turn:
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


def outline_key(messages: Sequence[Message], tools: Any) -> tuple[str, ...] | None:
    """What conversations must share to have one outline; None for those that have none."""
    if tools or not all(is_plain(message) and message["content"].strip() for message in messages):
        return None
    return tuple(message["role"] for message in messages)


@dataclass(frozen=True)
class Outline:
    """The text between messages, and where in it turns begin and end.

    Attributes:
        literals: Text before, between and after the messages' texts.
        edges: For each turn: its message, how many characters before the message's text it begins,
            how many after it ends, and whether it ends with a stop.
    """

    literals: tuple[str, ...]
    edges: tuple[tuple[int, int, int, bool], ...]

    @staticmethod
    def learn(
        messages: Sequence[Message], text: str, speech: list[Span], turns: list[Turn]
    ) -> Outline | None:
        """The outline of a conversation that has been told apart.

        Args:
            messages: Its messages.
            text: Its rendered text.
            speech: Spans of what was said, in the order of the text.
            turns: Its turns.

        Returns:
            The outline; None where the template moves messages, or leaves some out.
        """
        if [message["content"].strip() for message in messages] != [text[a:b] for a, b in speech]:
            return None
        bounds = [0, *(place for span in speech for place in span), len(text)]
        literals = [text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        edges = [
            (t.message, speech[t.message][0] - t.start, t.end - speech[t.message][1], t.stopped)
            for t in turns
        ]
        return Outline(tuple(literals), tuple(edges))

    def turns(self, messages: Sequence[Message], text: str) -> list[Turn] | None:
        """The turns of another conversation, or None if it does not follow the outline.

        Args:
            messages: Its messages, as many as the outline's.
            text: Its rendered text.
        """
        pieces = [self.literals[0]]
        spans: list[Span] = []
        at = len(pieces[0])
        for message, literal in zip(messages, self.literals[1:], strict=True):
            said = message["content"].strip()
            pieces += (said, literal)
            spans.append((at, at + len(said)))
            at += len(said) + len(literal)
        if "".join(pieces) != text:
            return None
        return [
            Turn(message, spans[message][0] - before, spans[message][1] + after, None, stopped)
            for message, before, after, stopped in self.edges
        ]
