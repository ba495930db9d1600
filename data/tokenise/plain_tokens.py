"""Token ids and masks of rows that are no conversations."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np

from data.rows.plain import PlainRow
from data.templates.marks import Span
from data.tokenise.masked_tokenizer import MaskedTokenizer, TokenizedText
from data.tokenise.options import TokenizeOptions


def plain_tokens(row: PlainRow, text: TokenizedText, options: TokenizeOptions) -> TokenizedText:
    """The document of a row.

    Args:
        row: The row.
        text: The tokens of its text.
        options: What stands before and after a text.

    Returns:
        Raw text as the tokenizer begins it, all of it and the end of the text trained; or the row's own
        ids. The first token is never trained, since nothing comes before it.
    """
    if row.text:
        ids = text.ids.tolist()
        prefix = (
            [] if ids[: len(options.text_prefix)] == [*options.text_prefix] else options.text_prefix
        )
        end = (
            [] if options.text_end is None or ids[-1:] == [options.text_end] else [options.text_end]
        )
        ids = [*prefix, *ids, *end]
        trained = [*[False] * len(prefix), *[True] * (len(ids) - len(prefix))]
    else:
        ids, trained = list(row.ids), list(row.trained)
    mask = np.array(trained, np.uint8)
    mask[:1] = 0
    return TokenizedText(np.array(ids, np.int32), mask, 0)


def shown_tokens(ids: list[int], tokenizer: MaskedTokenizer) -> tuple[str, list[Span]]:
    """The text that tokens stand for, each decoded by itself, and the character span of each."""
    parts = [tokenizer.backend.decode([token], skip_special_tokens=False) for token in ids]
    ends = accumulate(map(len, parts), initial=0)
    return "".join(parts), list(pairwise(ends))
