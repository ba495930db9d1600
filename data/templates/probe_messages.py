"""The tiny messages from which is learned what a template wants, and what it writes around turns."""

from __future__ import annotations

from collections.abc import Sequence

from data.rows.conversation import Message
from data.templates.marks import BLOCK_CLOSE, BLOCK_OPEN, mark_conversation, split_marks
from data.templates.template import ChatTemplate

CALL_ID = "call12345"
ASK: Message = {"role": "user", "content": "q q"}
ANSWER: Message = {"role": "assistant", "content": "a a"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": CALL_ID,
            "function": {"name": "look", "arguments": {"a": "b b"}},
        }
    ],
}
RESULT: Message = {"role": "tool", "content": "r r", "name": "look", "tool_call_id": CALL_ID}


def render_probe(
    template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Messages, in the template's forms, rendered with marks around what is said, not around blocks.

    Raises:
        RowError: the template refuses or cannot render them.
    """
    marked, _ = mark_conversation(messages)
    text = template.render(marked, add_generation_prompt=add_generation_prompt)
    return split_marks(text, BLOCK_OPEN, BLOCK_CLOSE)[0]
