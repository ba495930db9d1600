r"""Token ids and loss masks of rendered texts, in batches.

The tokenizers library tells where each token lies in the text, but that costs as much as a third of
the tokenising. Tokens of byte-level tokenizers (Qwen, Llama 3, DeepSeek, GPT) say it themselves:

    text      "a bé"            spelled   b"a" b" b" b"\xc3" b"\xa9"      joined: the text's own bytes
    tokens     a  Ġb  Ã  ©      ends        1     3      4       5

So only ids are asked for, and the bytes that they stand for are joined. If that gives the text's
bytes back, running sums of their lengths are the tokens' places; if every edge of a trained span
falls between two tokens, the mask is what lies between the edges. Both are checked for every text,
and a text that fails either check, or any text of another kind of tokenizer, is tokenised again with
the library's offsets (``data.tokenise.token_mask``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data.templates.marks import Span
from data.tokenise.token_mask import token_mask
from data.tokenise.word_tokenizer import WordTokenizer

# Bytes that occur in no valid UTF-8: a token with this spelling never joins to a text.
_UNSPELLABLE = b"\xff"


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one text.

    Attributes:
        ids: int32 ``[tokens]``.
        mask: uint8 ``[tokens]``, 1 for trained.
        crossing: Tokens that cross an edge of a trained span; they are not trained.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    crossing: int


class MaskedTokenizer:
    """Tokenises texts and marks the tokens in given character spans.

    Args:
        tokenizer: The tokenizers library's JSON.
        added: Ids and texts of all added tokens.
    """

    def __init__(self, tokenizer: str, added: dict[int, str]) -> None:
        self.backend = Tokenizer.from_str(tokenizer)
        self.backend.no_padding()
        self.backend.no_truncation()
        # Adds special tokens, which templates write themselves, and may cut spaces off offsets.
        self.backend.post_processor = None
        self._added_ids = frozenset(added)
        self._spelling = _Spelling(self.backend, added)
        self._words = WordTokenizer.of(self.backend)
        self.spells = self._spells()

    def tokenize(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[TokenizedText]:
        """Tokenise texts, without adding special tokens.

        Args:
            texts: Valid Unicode.
            spans: For each text its trained character spans [begin, end), ascending.
        """
        if not self.spells:
            return self._with_offsets(texts, spans)
        found = self._spelled(texts, spans)
        left = [number for number, result in enumerate(found) if result is None]
        if left:
            again = self._with_offsets([texts[n] for n in left], [spans[n] for n in left])
            for number, result in zip(left, again, strict=True):
                found[number] = result
        return [result for result in found if result is not None]

    def count(self, text: str) -> int:
        """The number of tokens in a text."""
        return len(self._ids([text])[0])

    def offsets(self, text: str) -> list[Span]:
        """The character span of each token, as the library tells it."""
        return self.backend.encode(text, add_special_tokens=False).offsets

    def _spells(self) -> bool:
        """Whether it is worth trying: the tokens of a small text spell it out."""
        text = "Is it 7?\n"
        return b"".join(map(self._spelling.__getitem__, self._ids([text])[0])) == text.encode()

    def _with_offsets(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[TokenizedText]:
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        results = []
        for encoding, text, own in zip(encodings, texts, spans, strict=True):
            mask, crossing = token_mask(encoding, own, text, self._added_ids)
            results.append(TokenizedText(np.array(encoding.ids, np.int32), mask, crossing))
        return results

    def _spelled(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[TokenizedText | None]:
        """The texts whose tokens spell them out; None for those that need the library's offsets."""
        ids = self._ids(texts)
        self._spot_check(texts, ids)
        every = list(chain.from_iterable(ids))
        flat = np.array(every, np.int32)
        spelled = list(map(self._spelling.__getitem__, every))
        ends = list(accumulate(map(len, spelled)))
        mask = np.zeros(len(every), np.uint8)
        results: list[TokenizedText | None] = []
        first = begins_at = 0  # token, and byte in the texts one after another
        for text, own_ids, own in zip(texts, ids, spans, strict=True):
            last = first + len(own_ids)
            data = text.encode()
            result = None
            if b"".join(spelled[first:last]) == data:
                trained = _tokens_of(own, text, data, begins_at, ends, first, last)
                if trained is not None:
                    for begin, end in trained:
                        mask[begin:end] = 1
                    result = TokenizedText(flat[first:last], mask[first:last], 0)
            results.append(result)
            first, begins_at = last, ends[last - 1] if last else 0
        return results

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is None:
            return self._encode(texts)
        of_words = self._words.ids
        ids = [of_words(text) if text.isascii() else None for text in texts]
        others = iter(self._encode([t for t, own in zip(texts, ids, strict=True) if own is None]))
        return [next(others) if own is None else own for own in ids]

    def _spot_check(self, texts: Sequence[str], ids: Sequence[list[int]]) -> None:
        """Compare one text of each batch with the library, whatever was checked at the start."""
        if self._words is None or not texts:
            return
        longest = max(range(len(texts)), key=lambda number: len(texts[number]))
        if self._encode([texts[longest]])[0] != ids[longest]:
            raise RuntimeError(
                f"data.tokenise.word_tokenizer gives other ids than the tokenizer for {texts[longest]!r}"
            )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class _Spelling(dict[int, bytes]):
    """The bytes that each token id stands for, looked up when first asked for."""

    def __init__(self, backend: Tokenizer, added: dict[int, str]) -> None:
        super().__init__((token_id, text.encode()) for token_id, text in added.items())
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            spelled = bytes(map(_BYTE_OF.__getitem__, token)) or _UNSPELLABLE
        except KeyError:
            spelled = _UNSPELLABLE
        self[token_id] = spelled
        return spelled


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write the 256 bytes.

    Source: ``bytes_to_unicode`` of GPT-2's encoder.py: printable bytes of Latin-1 stand for
    themselves, all others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _tokens_of(
    spans: Sequence[Span],
    text: str,
    data: bytes,
    begins_at: int,
    ends: list[int],
    first: int,
    last: int,
) -> list[Span] | None:
    """Token ranges of character spans, or None where an edge falls inside a token.

    Args:
        spans: Character spans in the text.
        text: The text.
        data: The same in UTF-8.
        begins_at: Where its first byte stands among the bytes of all texts.
        ends: Where each token of all texts ends among these bytes.
        first: The text's first token.
        last: One past its last token.
    """
    ascii_only = len(data) == len(text)
    ranges: list[Span] = []
    for span in spans:
        tokens = []
        for char in span:
            byte = begins_at + (char if ascii_only else len(text[:char].encode()))
            token = first
            if byte > begins_at:
                token = bisect_left(ends, byte, first, last) + 1
                if token > last or ends[token - 1] != byte:
                    return None
            tokens.append(token)
        ranges.append((tokens[0], tokens[1]))
    return ranges
