"""What is said of a row before its turns are looked for: refusals that no template can answer for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from data.errors import RowError
from data.masking.turns import Turn
from data.rows.conversation import REASONING_FIELDS, Conversation, Message, split_thinking

_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|amp|lt|gt|quot|apos);")


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
    """See that what users and system prompts say comes out.

    Raises:
        RowError: an answer would be trained without its question.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"]
        said = said if isinstance(said, list) else [{"text": said}]
        asked = message["role"] not in ("assistant", "tool")
        if asked and any(part.get("text", "").strip() not in text for part in said):
            raise question_dropped(number, message)


def require_results(messages: Sequence[Message], text: str) -> None:
    """See that the results of tools come out; a template may spell them as JSON, or their values.

    Raises:
        RowError: an answer would be trained without what it is about.
    """
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool" and not _rewritten(message["content"].strip(), text):
            raise question_dropped(number, message)


def question_dropped(number: int, message: Message) -> RowError:
    """The refusal of a row of which a template leaves out message ``number`` (from 1)."""
    what = "tool result" if message["role"] == "tool" else "question"
    return RowError(
        f"{what} dropped",
        f"the template leaves out or changes what message {number} ({message['role']}) "
        f"says: {str(message['content']).strip()[:60]!r}; --chat-template FILE gives another",
    )


def _rewritten(said: str, text: str) -> bool:
    """Whether a tool's result is in the text as JSON spells it, or each value of it is."""
    if any(spelled in text for spelled in _spellings(said)):
        return True
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        return False
    return all(any(s in text for s in _spellings(leaf)) for leaf in _leaves(value))


def _spellings(said: str) -> set[str]:
    return {said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]}


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [key, *_leaves(item)]]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value.strip()] if isinstance(value, str) else []


def refuse_escapes(said: Sequence[Any], source: str, text: str) -> None:
    """Refuse HTML's spelling of characters where nobody used it: no chat is HTML.

    Args:
        said: Everything that went into the template.
        source: The template.
        text: What it wrote.

    Raises:
        RowError: the template escapes what it writes, such as quotes as ``&#34;``.
    """
    if "&" not in text:
        return
    found = set(_ENTITY.findall(text))
    if found:
        found -= set(_ENTITY.findall(source + json.dumps(said, ensure_ascii=False, default=str)))
    if found:
        raise RowError(
            "escaped text",
            f"the template writes {min(found)!r}, which nobody said: it escapes text as HTML; take "
            "`escape` and the like out of it (--chat-template FILE)",
        )


def reason_once(messages: Sequence[Message]) -> list[Message]:
    """Messages whose reasoning is in a field or in the content, not in both; else the same objects.

    Raises:
        RowError: both places have some, and they differ.
    """
    return [
        _reasons_once(number, message) if message["role"] == "assistant" else message
        for number, message in enumerate(messages, 1)
    ]


def _reasons_once(number: int, message: Message) -> Message:
    said = message["content"]
    fields = [name for name in REASONING_FIELDS if message.get(name)]
    if not fields or not isinstance(said, str) or "</think>" not in said:
        return message
    inside, rest = split_thinking(said.lstrip())
    if inside.strip() in ("", str(message[fields[0]]).strip()):
        return {**message, "content": rest}
    if said.lstrip().startswith("<think>"):
        raise RowError(
            "reasoning twice",
            f"message {number} has {str(message[fields[0]])[:60]!r} in {fields[0]} and "
            f"{inside.strip()[:60]!r} in its content: give one of them",
        )
    return message


def what_it_lacks(messages: Sequence[Message]) -> str:
    """What of a row that a template refuses the template may not know, and what to do."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        found = "calls tools"
    elif any(message["role"] == "system" for message in messages):
        found = "has a system prompt"
    else:
        return ""
    return f" (the row {found}; --chat-template FILE gives a template that renders this)"
