"""What is said of a row before its turns are looked for: refusals that no template can answer for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data.errors import RowError
from data.masking.turns import Turn
from data.rows.conversation import REASONING_FIELDS, Conversation, Message


def refuse_stray_tags(messages: Sequence[Message]) -> None:
    """Refuse think tags without their other half: the text beside one may be about the tag.

    Raises:
        RowError: there is such a text, and a policy has to know whether it is reasoning.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"] if message["role"] == "assistant" else ""
        if not isinstance(said, str) or "think>" not in said:
            continue
        before, closing, _ = said.partition("</think>")
        if closing and before.strip() and not before.lstrip().startswith("<think>"):
            raise RowError(
                "stray think tag",
                f"message {number} has </think> without <think> at its beginning: whether "
                f"{before[-60:]!r} is reasoning cannot be told",
            )
        if leaves_thinking_open(said):
            rest = said[said.rindex("<think>") :]
            raise RowError(
                "stray think tag",
                f"message {number} has <think> without </think> after it (an answer that was cut "
                f"off?): whether {rest[:60]!r} is reasoning cannot be told",
            )


def leaves_thinking_open(said: str) -> bool:
    """Whether the last think tag of an answer opens a block."""
    return said.rfind("<think>") > said.rfind("</think>")


def ends_in_thought(messages: Sequence[Message]) -> bool:
    """Whether an answer begins with a think block that it never closes, as cut off ones do."""
    return any(
        message["role"] == "assistant"
        and isinstance(message["content"], str)
        and message["content"].lstrip().startswith("<think>")
        and leaves_thinking_open(message["content"])
        for message in messages
    )


def refuse_stops_inside(
    conversation: Conversation, text: str, turns: Sequence[Turn], stops: Sequence[str]
) -> None:
    """Refuse a stop token in the middle of what is trained: it would teach to stop there.

    Args:
        conversation: The row.
        text: Its rendered text.
        turns: The assistant's turns in it.
        stops: Texts of the tokens that end turns.

    Raises:
        RowError: an answer itself holds one; a template may write some between an answer's parts.
    """
    for turn in turns:
        for stop in stops if conversation.trained[turn.message] else ():
            at = text.find(stop, turn.start, turn.end)
            if at >= 0 and not (turn.stopped and at + len(stop) == turn.end):
                _refuse_said(stop, conversation)


def _refuse_said(stop: str, conversation: Conversation) -> None:
    for number, message in enumerate(conversation.messages, 1):
        said = [message.get(name) for name in ("content", *REASONING_FIELDS)]
        said.append(json.dumps(message.get("tool_calls") or [], ensure_ascii=False))
        if message["role"] == "assistant" and any(stop in str(part) for part in said):
            raise RowError(
                "stop token in text",
                f"message {number} itself holds {stop!r}, with which the template ends answers: the "
                "model would learn to stop there; take it out",
            )


def require_questions(messages: Sequence[Message], text: str) -> None:
    """See that what users and system prompts say comes out; results of tools may be rewritten.

    Raises:
        RowError: an answer would be trained without its question.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"]
        if message["role"] in ("user", "system") and isinstance(said, str):
            if said.strip() not in text:
                raise RowError(
                    "question dropped",
                    f"the template leaves out or changes what message {number} ({message['role']}) "
                    f"says: {said.strip()[:60]!r}; --chat-template FILE gives another",
                )


def what_it_lacks(messages: Sequence[Message]) -> str:
    """What of a row that a template refuses the template may not know, and what to do."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        found = "calls tools"
    elif any(message["role"] == "system" for message in messages):
        found = "has a system prompt"
    else:
        return ""
    return f" (the row {found}; --chat-template FILE gives a template that renders this)"
