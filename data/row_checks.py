"""What is said of a row before its turns are looked for: refusals that no template can answer for."""

from __future__ import annotations

from collections.abc import Sequence

from data.chat_template import Message
from data.errors import RowError


def refuse_unopened(messages: Sequence[Message]) -> None:
    """Refuse text before a closing think tag that nothing opened: it may be about the tag.

    Raises:
        RowError: there is such a text, and a policy has to know whether it is reasoning.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"] if message["role"] == "assistant" else ""
        before, closing, _ = said.partition("</think>") if isinstance(said, str) else ("", "", "")
        if closing and before.strip() and not before.lstrip().startswith("<think>"):
            raise RowError(
                "stray think tag",
                f"message {number} has </think> without <think> at its beginning: whether "
                f"{before[-60:]!r} is reasoning cannot be told",
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
