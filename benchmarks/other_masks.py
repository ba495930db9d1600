"""Two other masks of a rendered text, told from its characters and by transformers, and how they differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from data.rows.conversation import Message
from data.templates.marks import Span

_TAG = re.compile(r"<[^<>\s]*>")
_EMPTY_BLOCK = re.compile(r"(?:<think>\s*</think>\s*)+|<think>\s*")


def mask_by_characters(
    text: str,
    spans: Sequence[Span],
    ids: Sequence[int],
    offsets: Sequence[Span],
    added_ids: Collection[int],
) -> npt.NDArray[np.uint8]:
    """The mask told character by character: a token is trained when all its characters are.

    Args:
        text: The text that was tokenised.
        spans: Its trained character spans [begin, end).
        ids: Its tokens.
        offsets: The character span of each, as the tokenizers library tells it.
        added_ids: Ids of added tokens, which may swallow white space after them.
    """
    trained = np.zeros(len(text), bool)
    for begin, end in spans:
        trained[begin:end] = True
    mask = np.zeros(len(ids), np.uint8)
    for number, (token, (begin, end)) in enumerate(zip(ids, offsets, strict=True)):
        if token in added_ids:
            end = begin + len(text[begin:end].rstrip())
        mask[number] = end > begin and bool(trained[begin:end].all())
    return mask


def transformers_mask(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    names: dict[str, str],
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Ids and assistant mask by transformers, for a template with ``{% generation %}``.

    Args:
        tokenizer: The tokenizer.
        source: The template.
        messages: Messages in the forms that it wants.
        tools: Tools on offer.
        names: What the template may name, such as ``bos_token``.
    """
    found = tokenizer.apply_chat_template(
        list(messages),
        tools=tools,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **names,
    )
    return list(found["input_ids"]), np.array(found["assistant_masks"], np.uint8)


def differences(
    text: str,
    offsets: Sequence[Span],
    ours: npt.NDArray[np.uint8],
    theirs: npt.NDArray[np.uint8],
    spans: Sequence[Span],
) -> set[str]:
    """In what transformers' mask differs from ours, token by token.

    Args:
        text: The rendered text.
        offsets: The character span of each token.
        ours: Our mask.
        theirs: That of transformers.
        spans: Our trained spans.

    Returns:
        Some of ``empty think block``, ``header``, ``after the stop`` and ``token of header and
        answer`` (which they train and no answer needs), and ``answer`` with the text of a token
        that should be the same in both.
    """
    blocks = [match.span() for match in _EMPTY_BLOCK.finditer(text)]
    begins, ends = {begin for begin, _ in spans}, [end for _, end in spans]
    found: set[str] = set()
    differ = ours != theirs
    crossing = set()
    for number in np.flatnonzero(differ & (theirs > 0)).tolist():
        begin, until = offsets[number]
        if any(begin < edge < until for edge in [*begins, *ends]):
            found.add("token of header and answer")
            crossing.add(number)
            differ[number] = False
    runs = np.flatnonzero(np.diff(differ.astype(np.int8), prepend=0, append=0))
    for first, last in runs.reshape(-1, 2).tolist():
        begin, until = offsets[first][0], offsets[last - 1][1]
        extra = bool(theirs[first:last].all())
        if extra and any(a <= begin and until <= b for a, b in blocks):
            found.add("empty think block")
        elif extra and (until in begins or last in crossing):
            found.add("header")
        elif (
            extra
            and any(end <= begin and not text[end:begin].strip() for end in ends)
            # White space at the end of a block may be one token with what follows the block, or be in
            # two tokens, of which transformers 5.24 takes both.
            and (
                _says_nothing(text[begin:until])
                or all(text[at : at + 1].isspace() for at, _ in offsets[first:last])
            )
        ):
            found.add("after the stop")
        else:
            found.add(f"answer {text[begin:until]!r}")
    return found


def _says_nothing(text: str) -> bool:
    return not _TAG.sub("", text).strip()
