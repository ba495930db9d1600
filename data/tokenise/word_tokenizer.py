r"""Tokenising ASCII text word by word, from memory.

A byte-level BPE tokenizer cuts a text at its added tokens, cuts the rest into words with a regular
expression, and merges the bytes of each word for itself. Texts repeat their words, and the library's
bookkeeping for each (offsets, copies, alignments) costs several times what remembering its ids does:

    "<|im_start|>user\nHow many"   ->   <|im_start|>  "user"  "\n"  "How"  " many"   ->   ids of each

In ASCII text nothing depends on a version of Unicode, normal forms change nothing, and Python's
``re`` means by these expressions what the library's engine means: both try the alternatives in
order and back up alike. Expressions with anything in them of which that is not known, and
tokenizers of any other build, are left to the library. What is left is compared with the library on
all short strings of the kinds of characters that expressions tell apart, when it is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models

# The expression inside ByteLevel: tokenizers 0.23, pre_tokenizers/byte_level.rs, from GPT-2.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What is in each Unicode category, of ASCII; the last two have nothing, so they name what is outside.
_ASCII_MEMBERS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9"} | dict.fromkeys(
    ("Lt", "Lm", "Lo", "M", "Mn", "Han"), r"\x80-\xff"
)
_PIECE = re.compile(
    r"(?P<category>\\p\{(?P<name>\w+)\})|(?P<escape>\\[sSrnt'])|(?P<class>\[\^?)|(?P<end>\])"
    r"|(?P<group>\(\?(?:i:|[:!=])|\((?!\?)|\)|\|)|(?P<repeat>\{\d+(?:,\d*)?\}(?![+?])|[?*+]\+?)"
    r"|(?P<plain>[A-Za-z0-9'/ ,:;_\-])"
)
# One character of each kind that the expressions tell apart.
_KINDS = " \n\r'sSx7.<"
_LONGEST_KEPT = 32  # characters of a word
_MOST_KEPT = 1 << 16  # words; some 15 MB


class WordTokenizer:
    """Gives the tokens of ASCII texts.

    Args:
        backend: The tokenizer; its model is asked for the ids of new words.
        words: Finds the words between added tokens.
        added: Ids of added tokens by text.
    """

    def __init__(self, backend: Tokenizer, words: re.Pattern[str], added: dict[str, int]) -> None:
        self._find_words = words.findall
        self._added = {text: _packed([number], [text]) for text, number in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._split = re.compile(f"({pattern})").split
        self._memory = _Memory(backend)

    @staticmethod
    def of(backend: Tokenizer) -> WordTokenizer | None:
        """A word tokenizer that does what ``backend`` does on ASCII text; None if there is none."""
        expression = _word_expression(backend)
        pattern = None if expression is None else in_ascii(expression)
        if pattern is None:
            return None
        added = {str(token): number for number, token in backend.get_added_tokens_decoder().items()}
        words = WordTokenizer(backend, pattern, added)
        return words if words.agrees(backend) else None

    def tokens(self, text: str) -> npt.NDArray[np.int32] | None:
        """The tokens of a text.

        Returns:
            int32 ``[tokens, 2]``: their ids, and how many of the text's bytes each stands for. Added
            up, these are its length if nothing lies between its words. None for text that is the
            library's: it is not ASCII, or the tokens of a word do not spell it.
        """
        if not text.isascii():
            return None
        tokens: list[bytes] = []
        try:
            for number, piece in enumerate(self._split(text)):
                if number % 2:
                    tokens.append(self._added[piece])
                elif piece:
                    tokens += map(self._memory.__getitem__, self._find_words(piece))
        except KeyError:
            return None
        return np.frombuffer(b"".join(tokens), np.int32).reshape(-1, 2)

    def agrees(self, backend: Tokenizer, longest: int = 3) -> bool:
        """Whether it cuts all strings of up to ``longest`` characters of each kind the same way."""
        for length in range(1, longest + 1):
            for text in map("".join, product(_KINDS, repeat=length)):
                places = [place for _, place in backend.pre_tokenizer.pre_tokenize_str(text)]
                if self._find_words(text) != [text[begin:end] for begin, end in places]:
                    return False
        texts = [f"{token}{after}" for token in self._added for after in ("", " a", "\n", token)]
        texts = [text for text in texts if text.isascii()]
        expected = backend.encode_batch_fast(texts, add_special_tokens=False)
        found = [self.tokens(text) for text in texts]
        return all(
            tokens is not None and tokens[:, 0].tolist() == encoding.ids
            for tokens, encoding in zip(found, expected, strict=True)
        )


class _Memory(dict[str, bytes]):
    """The tokens of words, packed, asked of the model when a word is new."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._model = backend.model

    def __missing__(self, word: str) -> bytes:
        written = word.translate(_WRITTEN)
        tokens = self._model.tokenize(written)
        spelled = [token.value for token in tokens]
        if "".join(spelled) != written:
            raise KeyError(word)
        packed = _packed([token.id for token in tokens], spelled)
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _MOST_KEPT:
                self.clear()
            self[word] = packed
        return packed


def _packed(ids: Sequence[int], spelled: Sequence[str]) -> bytes:
    return np.array([ids, [len(text) for text in spelled]], np.int32).T.tobytes()


# How byte-level vocabularies write the ASCII characters that are not printable, and the space.
_WRITTEN = {byte: 0x100 + byte for byte in range(0x21)} | {0x7F: 0x121}


def _word_expression(backend: Tokenizer) -> str | None:
    """The expression that finds words, where the tokenizer is one that is understood here."""
    model, tokens = backend.model, list(backend.get_added_tokens_decoder().values())
    plain_model = isinstance(model, models.BPE) and not (
        model.dropout
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or model.byte_fallback
    )
    plain_tokens = not any(token.lstrip or token.rstrip or token.single_word for token in tokens)
    # Tokens of two kinds would be looked for one kind after the other.
    one_kind = len({token.normalized for token in tokens}) <= 1
    if not (plain_model and plain_tokens and one_kind and _keeps_ascii(_facts(backend.normalizer))):
        return None
    steps = _facts(backend.pre_tokenizer)
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    uses_own = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _GPT2 if uses_own else None
    split = steps[0]
    if len(steps) > 2 or uses_own or split["type"] != "Split":
        return None
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    expression: str | None = split["pattern"].get("Regex")
    return expression


def _facts(part: Any) -> dict[str, Any]:
    """The settings of a tokenizer's normalizer or pre-tokenizer; empty where it has none."""
    if part is None:
        return {}
    facts: dict[str, Any] = json.loads(part.__getstate__())
    return facts


def _keeps_ascii(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer changes no ASCII text, as the four normal forms of Unicode do not.

    Source: Unicode Standard Annex #15, section 1.2.
    """
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return all(part["type"] in ("NFC", "NFD", "NFKC", "NFKD") for part in parts)


def in_ascii(expression: str) -> re.Pattern[str] | None:
    """An expression of the library for Python's ``re``, the same on ASCII text.

    Returns:
        The expression; None where it holds anything that the two might read differently.
    """
    pieces: list[str] = []
    at, in_class = 0, False
    while at < len(expression):
        found = _PIECE.match(expression, at)
        if found is None:
            return None
        kind, text = found.lastgroup, found.group()
        if found["category"]:
            members = _ASCII_MEMBERS.get(found["name"])
            if members is None:
                return None
            text = members if in_class else f"[{members}]"
        elif found["class"]:
            if in_class:
                return None
            in_class = True
        elif found["end"]:
            if not in_class:
                return None
            in_class = False
        elif kind != "escape" and kind != "plain" and in_class:
            return None
        pieces.append(text)
        at = found.end()
    try:
        return re.compile("".join(pieces), re.ASCII)
    except re.error:
        return None
