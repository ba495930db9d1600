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

Where prompt and answer meet inside a token, as after a header that ends in a blank, inference never has
that token: it is given the ids of the prompt and writes those of the answer. Such a text is cut there, and
its parts are tokenised one by one. An added token that swallows the white space after it is left whole.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from data.templates.marks import Span
from data.tokenise.fast_bpe import BYTE_OF, FastBPE
from data.tokenise.token_mask import token_mask

# Bytes that occur in no valid UTF-8: a token with this spelling never joins to a text.
_UNSPELLABLE = b"\xff"
_NO_TOKENS = np.empty((0, 2), np.int32)


class TokenizedText(NamedTuple):
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
        many: Whether texts come in numbers that are worth the second in which ``FastBPE`` is made ready.
    """

    def __init__(self, tokenizer: str, added: dict[int, str], many: bool = False) -> None:
        self._json = tokenizer
        self.backend = _backend(tokenizer)
        self._added_ids = frozenset(added)
        self._spelling = _Spelling(self.backend, added)
        self._fast = FastBPE.of(self.backend, tokenizer) if many else None
        self.spells = self._spells()

    @cached_property
    def largest_id(self) -> int:
        """The largest id that stands for a token."""
        known = self.backend.get_vocab(with_added_tokens=True).values()
        return max(chain(known, self._added_ids), default=-1)

    def tokenize(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[Span]],
        edges: Sequence[Sequence[int]] = (),
    ) -> list[TokenizedText]:
        """Tokenise texts, without adding special tokens.

        Args:
            texts: Valid Unicode.
            spans: For each text its trained character spans [begin, end), ascending.
            edges: For each text those edges of its spans at which a prompt ends or an answer does,
                ascending; none where empty.
        """
        edges = edges or [()] * len(texts)
        if not self.spells:
            return self._with_offsets(texts, spans, edges)
        found = self._spelled(texts, spans)
        left = [number for number, result in enumerate(found) if result is None]
        if left:
            again = self._with_offsets(
                [texts[n] for n in left], [spans[n] for n in left], [edges[n] for n in left]
            )
            for number, result in zip(left, again, strict=True):
                found[number] = result
        return [result for result in found if result is not None]

    def offsets(self, text: str, edges: Sequence[int] = ()) -> list[Span]:
        """The character span of each token, as the library tells it; ``edges`` as for ``tokenize``."""
        whole = self.backend.encode(text, add_special_tokens=False)
        return [
            (begin + at, end + at)
            for at, part in self._parts(text, whole, edges)
            for begin, end in part.offsets
        ]

    def _spells(self) -> bool:
        """Whether it is worth trying: the tokens of a small text spell it out."""
        return self._tokens(["Is it 7?\n"])[0] is not None

    def _with_offsets(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[Span]],
        edges: Sequence[Sequence[int]],
    ) -> list[TokenizedText]:
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        results = []
        for encoding, text, own, cuts in zip(encodings, texts, spans, edges, strict=True):
            ids: list[int] = []
            masks = []
            crossings = 0
            parts = self._parts(text, encoding, cuts)
            ends = [*(at for at, _ in parts[1:]), len(text)]
            for (at, part), end in zip(parts, ends, strict=True):
                inside = [(max(a, at) - at, min(b, end) - at) for a, b in own if a < end and b > at]
                mask, crossing = token_mask(part, inside, text[at:end], self._added_ids)
                ids += part.ids
                masks.append(mask)
                crossings += crossing
            results.append(TokenizedText(np.array(ids, np.int32), np.concatenate(masks), crossings))
        return results

    def _parts(
        self, text: str, whole: Encoding, edges: Sequence[int]
    ) -> list[tuple[int, Encoding]]:
        """The parts of a text between the edges that fall inside a token, and where each begins.

        Args:
            text: The text.
            whole: The same, tokenised.
            edges: Characters at which prompt and answer meet.
        """
        cuts = [edge for edge in edges if self._inside(whole, edge)]
        if not cuts:
            return [(0, whole)]
        added = [
            begin
            for token, (begin, _) in zip(whole.ids, whole.offsets, strict=True)
            if token in self._added_ids
        ]
        parts = [(0, self.backend.encode(text[: cuts[0]], add_special_tokens=False))]
        for begin, end in pairwise([*cuts, len(text)]):
            # Behind an added token a text begins anew, as it does at inference.
            again = min((at for at in added if begin <= at < end), default=end)
            for at, until, backend in ((begin, again, self._going_on), (again, end, self.backend)):
                if at < until:
                    parts.append((at, backend.encode(text[at:until], add_special_tokens=False)))
        return parts

    def _inside(self, whole: Encoding, edge: int) -> bool:
        """Whether a character is inside a token, other than the white space that an added one takes."""
        token = whole.char_to_token(edge)
        if token is None or whole.ids[token] in self._added_ids:
            return False
        begin: int = whole.offsets[token][0]
        return begin < edge

    @cached_property
    def _going_on(self) -> Tokenizer:
        """The tokenizer for a text that goes on: many put a blank before a text that begins."""
        return _backend(json.dumps(_without_prefix(json.loads(self._json))))

    def _spelled(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[TokenizedText | None]:
        """The texts whose tokens spell them out; None for those that need the library's offsets."""
        tokens = self._tokens(texts)
        flat = np.concatenate([_NO_TOKENS, *(own for own in tokens if own is not None)])
        ids, ends = flat[:, 0].copy(), memoryview(np.cumsum(flat[:, 1]))
        mask = np.zeros(len(ids), np.uint8)
        results: list[TokenizedText | None] = []
        first = begins_at = 0  # token, and byte in the texts one after another
        for text, found, own in zip(texts, tokens, spans, strict=True):
            last = first if found is None else first + len(found)
            ends_at = ends[last - 1] if last else 0
            result = None
            if found is not None and ends_at - begins_at == len(text.encode()):
                trained = _tokens_of(own, text, begins_at, ends, first, last)
                if trained is not None:
                    for begin, end in trained:
                        mask[begin:end] = 1
                    result = TokenizedText(ids[first:last], mask[first:last], 0)
            results.append(result)
            first, begins_at = last, ends_at
        return results

    def _tokens(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32] | None]:
        """For each text the tokens that spell it, as of ``FastBPE``; None where they do not."""
        fast = self._fast
        tokens = [fast.tokens(text) if fast else None for text in texts]
        self._spot_check(texts, tokens)
        left = [number for number, own in enumerate(tokens) if own is None]
        for number, ids in zip(left, self._encode([texts[n] for n in left]), strict=True):
            spelled = [self._spelling[token] for token in ids]
            if b"".join(spelled) == texts[number].encode():
                tokens[number] = np.array([ids, [*map(len, spelled)]], np.int32).T
        return tokens

    def _spot_check(
        self, texts: Sequence[str], tokens: Sequence[npt.NDArray[np.int32] | None]
    ) -> None:
        """Compare one text of each batch with the library, whatever was checked at the start."""
        fast = [number for number, own in enumerate(tokens) if own is not None]
        longest = max(fast, key=lambda number: len(texts[number]), default=None)
        if longest is None:
            return
        found = tokens[longest]
        if found is not None and self._encode([texts[longest]])[0] != found[:, 0].tolist():
            raise RuntimeError(
                f"data.tokenise.fast_bpe gives other ids than the tokenizer for {texts[longest]!r}"
            )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _backend(tokenizer: str) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer)
    backend.no_padding()
    backend.no_truncation()
    # Adds special tokens, which templates write themselves, and may cut spaces off offsets.
    backend.post_processor = None
    return backend


def _without_prefix(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's JSON, without what it puts before a text that begins."""

    def mend(step: Any) -> Any:
        if not isinstance(step, dict) or step.get("type") == "Prepend":
            return None
        for steps in ("normalizers", "pretokenizers"):
            if steps in step:
                step = {**step, steps: [kept for each in step[steps] if (kept := mend(each))]}
        if "prepend_scheme" in step:
            step = {**step, "prepend_scheme": "never"}
        return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step

    parts = ("normalizer", "pre_tokenizer")
    return {**tokenizer, **{part: mend(tokenizer.get(part)) for part in parts}}


class _Spelling(dict[int, bytes]):
    """The bytes that each token id stands for, looked up when first asked for."""

    def __init__(self, backend: Tokenizer, added: dict[int, str]) -> None:
        super().__init__((token_id, text.encode()) for token_id, text in added.items())
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            spelled = bytes(map(BYTE_OF.__getitem__, token)) or _UNSPELLABLE
        except KeyError:
            spelled = _UNSPELLABLE
        self[token_id] = spelled
        return spelled


def _tokens_of(
    spans: Sequence[Span],
    text: str,
    begins_at: int,
    ends: Sequence[int] | memoryview,
    first: int,
    last: int,
) -> list[Span] | None:
    """Token ranges of character spans, or None where an edge falls inside a token.

    Args:
        spans: Character spans in the text.
        text: The text.
        begins_at: Where its first byte stands among the bytes of all texts.
        ends: Where each token of all texts ends among these bytes.
        first: The text's first token.
        last: One past its last token.
    """
    ascii_only = text.isascii()
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
