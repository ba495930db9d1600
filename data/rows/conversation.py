"""A conversation, as every row becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

# Where messages keep reasoning; rows use the first, a template may read another.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


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


def split_thinking(content: str) -> tuple[str, str]:
    """Split content into the reasoning inside its think tags and what follows them."""
    before, _, rest = content.rpartition("</think>")
    return before.replace("<think>", "", 1).strip("\n"), rest.lstrip("\n")
