"""A conversation, as every row becomes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

# Where messages keep reasoning; rows use the first, a template may read another.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# What the rendering sets, templates' functions among it: no variable may take its place.
_RESERVED = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        *("mask_token", "additional_special_tokens"),
        *("raise_exception", "strftime_now", "range", "dict", "cycler", "joiner", "namespace"),
    )
)


def reserved_in(variables: Mapping[str, Any]) -> list[str]:
    """The names among template variables that only the rendering itself can set."""
    return sorted(_RESERVED.intersection(variables))


@dataclass
class Conversation:
    """One training example.

    Attributes:
        messages: ``role`` and ``content`` and, where the data has them, ``reasoning_content``,
            ``tool_calls``, ``name``, ``tool_call_id``. Keys without a value are absent.
        tools: JSON schemas of the tools on offer, or None.
        trained: For each message, whether its text may be trained; only assistant messages are.
        variables: Template variables of this row alone.
        open_end: Whether the last answer goes on after its end, so that no stop is trained there.
        unread: Columns and fields of the row that nobody reads (``data.rows.columns``).
        pictures: Those of the image parts of the messages, in their order, as the row holds them. The
            content of a message with some is a list of ``{"type": "image"}`` and text parts.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    trained: list[bool] = field(default_factory=list)
    variables: Mapping[str, Any] = field(default_factory=dict)
    open_end: bool = False
    unread: tuple[str, ...] = ()
    pictures: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.trained:
            self.trained = [message["role"] == "assistant" for message in self.messages]


def begin_of_last_turn(messages: Sequence[Message]) -> int:
    """Index of the first message of the last turn: all after the last question that was answered.

    Calls of tools and their results belong to the turn of the answer that they lead to.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    return max((i + 1 for i in range(last) if messages[i]["role"] == "user"), default=0)


def count_pictures(messages: Sequence[Message]) -> int:
    """Image parts of messages."""
    said = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(part.get("type") == "image" for content in said for part in content)


def has_empty_answer(conversation: Conversation) -> bool:
    """Whether an answer that is trained says nothing, so that the model learns to stop at once."""
    return any(
        trained
        and not str(message["content"]).strip()
        and not message.get("tool_calls")
        and not any(message.get(field) for field in REASONING_FIELDS)
        for message, trained in zip(conversation.messages, conversation.trained, strict=True)
    )


def split_thinking(content: str) -> tuple[str, str]:
    """Split content into the reasoning inside its think tags and what follows them."""
    before, _, rest = content.rpartition("</think>")
    return before.replace("<think>", "", 1).strip("\n"), rest.lstrip("\n")
