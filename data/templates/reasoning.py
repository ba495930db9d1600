"""Keeping the reasoning that templates throw away.

At inference a template may drop the reasoning of earlier turns to save context. In training that
deletes data: the model would learn to answer without thinking wherever a turn was not the last.
The usual two ways of dropping are taken out of the template here; renderings of conversations
without reasoning stay the same, which is checked. What is still dropped after that is found row by
row and refused (see ``data.masking.answers``).
"""

from __future__ import annotations

import re

from data.errors import RowError
from data.rows.conversation import Message
from data.templates.marks import Span
from data.templates.template import ChatTemplate

# DeepSeek: cuts everything up to the closing think tag from the content of every turn.
REMOVE_THINK_CHAT_TEMPLATE = re.compile(
    r"\{%-?\s*if\s+'</think>'\s+in\s+content\s*-?%\}\s*"
    r"\{%-?\s*set\s+content\s*=\s*content\.split\('</think>'\)\[-1\]\s*-?%\}\s*"
    r"\{%-?\s*endif\s*-?%\}"
)
# Qwen3, GLM and others: writes reasoning only after the last question.
ONLY_AFTER_LAST_QUESTION = re.compile(
    r"loop\.index0\s*>\s*(?:\w+\.)?last_(?:query|user)\w*(?:\.value)?"
)
# What opens and closes reasoning in the families that mark it inside a turn.
_BLOCKS = (
    (r"<think>", r"</think>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|channel>thought", r"<channel\|>"),
)
# Blocks with nothing in them, as templates and data write them. Templates end one with at most two
# line breaks; more white space is the answer's own.
_EMPTY = "|".join(rf"{opening}\s*{closing}" for opening, closing in _BLOCKS)
_EMPTY_BLOCK = re.compile(rf"(?:{_EMPTY})\n{{0,2}}")
LEADING_EMPTY_BLOCK = re.compile(rf"\s*(?:{_EMPTY})\n{{0,2}}")
# Where a prompt opens the block, an answer that has none may close it (GLM-4.7).
LEADING_CLOSE = re.compile(rf"\s*(?:{'|'.join(closing for _, closing in _BLOCKS)})\n{{0,2}}")
# A block that a prompt opens, or has empty.
OPENED_BLOCK = re.compile(
    "(?:" + "|".join(rf"{opening}\s*(?:{closing}\s*)?" for opening, closing in _BLOCKS) + r")\Z"
)
_OR_REASONING = r"(\g<0> or reasoning_content)"
_PLAIN: list[list[Message]] = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "b"},
    ],
]


def keep_reasoning(source: str) -> tuple[str, int]:
    """Take the parts out of a template that drop reasoning.

    Args:
        source: Jinja source of the template.

    Returns:
        The source to use, and how many parts were taken out (0: it is unchanged).
    """
    kept, fragments = REMOVE_THINK_CHAT_TEMPLATE.subn("", source)
    kept, conditions = ONLY_AFTER_LAST_QUESTION.subn(_OR_REASONING, kept)
    for part, changes in ((kept, fragments + conditions), *_one_by_one(source)):
        if changes and all(_same(source, part, messages) for messages in _PLAIN):
            return part, changes
    return source, 0


def without_empty_blocks(text: str, span: Span) -> list[Span]:
    """What is left of a trained span without its empty think blocks.

    Args:
        text: The rendered text.
        span: Characters [begin, end) in it.
    """
    begin, end = span
    left: list[Span] = []
    for block in _EMPTY_BLOCK.finditer(text, begin, end):
        # White space alone between a turn's beginning and a block goes with the block.
        if text[begin : block.start()].strip():
            left.append((begin, block.start()))
        begin = block.end()
    if begin < end:
        left.append((begin, end))
    return left


def _one_by_one(source: str) -> list[tuple[str, int]]:
    return [
        REMOVE_THINK_CHAT_TEMPLATE.subn("", source),
        ONLY_AFTER_LAST_QUESTION.subn(_OR_REASONING, source),
    ]


def _same(first: str, second: str, messages: list[Message]) -> bool:
    try:
        return ChatTemplate(first).render(messages) == ChatTemplate(second).render(messages)
    except RowError:
        return False
