"""From trained characters to trained tokens.

A token is trained when every character of it was written by the assistant. At a boundary that
falls inside a token that means: a token which begins in the header or the question and ends in the
answer is not trained, because inference never asks the model for it (there the prompt ends where
the header ends), and neither is one that begins in the answer and ends in what the template writes
after the stop. Such tokens are counted (``boundary_tokens`` in the report). There are few: headers and
stops end in special tokens or line breaks, and texts are cut where they do not
(``data.tokenise.masked_tokenizer``).
One exception: an added token such as Phi-3's ``<|end|>`` swallows the white space that follows it.
It is the stop, and it is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from data.templates.marks import Span


def token_mask(
    encoding: Encoding, spans: Sequence[Span], text: str, added_ids: Collection[int] = ()
) -> tuple[npt.NDArray[np.uint8], int]:
    """Mark the tokens that lie in the given character spans.

    Args:
        encoding: The tokenised text, with offsets.
        spans: Character spans [begin, end) in ascending order.
        text: The text that was tokenised.
        added_ids: Ids of added tokens, which may swallow white space around them.

    Returns:
        uint8 ``[tokens]``, 1 for trained, and how many tokens crossed a boundary (0 in the mask).
    """
    mask = np.zeros(len(encoding), np.uint8)
    crossing = 0
    for begin, end in spans:
        first = _token_at(encoding, begin, end)
        if first is None:
            continue
        if _chars(encoding, first)[0] < begin:
            crossing += 1
            first = _next_token(encoding, first)
        last = _token_before(encoding, end, begin)
        if last is None or last < first:
            continue
        # Several tokens may share one character (bytes of an emoji): all of them belong to it.
        last = _last_of_same_char(encoding, last)
        beyond = text[end : _chars(encoding, last)[1]]
        if beyond and not (beyond.isspace() and encoding.ids[last] in added_ids):
            crossing += 1
            boundary = _chars(encoding, last)[0]
            while last >= first and _chars(encoding, last)[0] >= boundary:
                last -= 1
        mask[first : last + 1] = 1
    return mask, crossing


def _token_at(encoding: Encoding, begin: int, end: int) -> int | None:
    """The first token at or after character ``begin``; characters may belong to no token."""
    for position in range(begin, end):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _token_before(encoding: Encoding, end: int, begin: int) -> int | None:
    for position in range(end - 1, begin - 1, -1):
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _next_token(encoding: Encoding, token: int) -> int:
    span = _chars(encoding, token)
    token += 1
    while token < len(encoding) and _chars(encoding, token) == span:
        token += 1
    return token


def _last_of_same_char(encoding: Encoding, token: int) -> int:
    end = _chars(encoding, token)[1]
    while token + 1 < len(encoding):
        if _chars(encoding, token + 1)[0] >= end:
            break
        token += 1
    return token


def _chars(encoding: Encoding, token: int) -> Span:
    span: Span | None = encoding.token_to_chars(token)
    assert span is not None, "the index came from this encoding"
    return span
