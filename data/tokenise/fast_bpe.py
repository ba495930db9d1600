"""Byte-level BPE by tiktoken: the ids of the tokenizers library in a third of its time.

Both cut a text at its added tokens, cut the rest into words with a regular expression and merge the bytes
of each word. The library merges by a list of rules, tiktoken any two neighbours that are a token together,
the lowest id first. These are the same where rules come in the order of the ids that they make, and where
the rules alone make every token of the bytes that it is spelled with: on the way to a token there is one
state of two parts, so no other two parts are ever its neighbours. Both are checked when one is loaded.

Tokenizers of any other build, and texts with characters of which versions of Unicode say different things,
are left to the library.
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models

# The expression inside ByteLevel: tokenizers 0.23, pre_tokenizers/byte_level.rs, from GPT-2.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Latin, Greek, Cyrillic, punctuation, Chinese, kana, Hangul and pictures: what of them is a letter,
# a number or white space is the same in every version of Unicode that is in use.
_SETTLED = re.compile(
    "[\0-\u024f\u0370-\u052f\u2000-\u206f\u2190-\u2bff\u3000-\u30ff\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff60"
    "\U0001f000-\U0001faff]*"
)
# One character of each kind that expressions tell apart.
_KINDS = " \n\r'sSx7.<é中\u3000。"


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write the 256 bytes.

    Source: ``bytes_to_unicode`` of GPT-2's encoder.py: printable bytes of Latin-1 stand for
    themselves, all others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class FastBPE:
    """Gives the tokens of texts.

    Args:
        encoding: Of tiktoken.
        spelled: The bytes of each token by id; added ones too.
    """

    def __init__(self, encoding: Any, spelled: dict[int, bytes]) -> None:
        self._encode = encoding.encode_to_numpy
        self._lengths = np.zeros(max(spelled) + 1, np.int32)
        self._lengths[list(spelled)] = [len(text) for text in spelled.values()]

    @staticmethod
    def of(backend: Tokenizer, written: str = "") -> FastBPE | None:
        """What gives the same ids as ``backend``, whose JSON may be at hand; None if there is none."""
        try:
            tiktoken: Any = importlib.import_module("tiktoken")
        except ImportError:  # there is none for this platform
            return None
        facts = json.loads(written or backend.to_str())
        expression = _word_expression(facts)
        if expression is None or not isinstance(backend.model, models.BPE):
            return None
        added = {token["content"]: token["id"] for token in facts["added_tokens"]}
        vocabulary = {t: n for t, n in facts["model"]["vocab"].items() if t not in added}
        try:
            ranks = {bytes(map(BYTE_OF.__getitem__, t)): n for t, n in vocabulary.items()}
        except KeyError:
            return None
        whole = all(bytes([byte]) in ranks for byte in range(256))
        if not whole or not _makes_all(backend.model, vocabulary, facts["model"]["merges"]):
            return None
        try:
            encoding = tiktoken.Encoding(
                "sft", pat_str=expression, mergeable_ranks=ranks, special_tokens=added
            )
        except ValueError:  # an expression that it does not know
            return None
        spelled = {number: text for text, number in ranks.items()}
        fast = FastBPE(encoding, spelled | {n: text.encode() for text, n in added.items()})
        return fast if fast._agrees(backend, added) else None

    def tokens(self, text: str) -> npt.NDArray[np.int32] | None:
        """The tokens of a text.

        Returns:
            int32 ``[tokens, 2]``: their ids, and how many of the text's bytes each stands for. Added
            up, these are its length if nothing lies between its words. None for text that is the
            library's.
        """
        if not text.isascii():
            if not _SETTLED.fullmatch(text) or not unicodedata.is_normalized("NFC", text):
                return None
        try:
            ids = self._encode(text, allowed_special="all")
        except ValueError:  # millions of blanks, in which its expressions lose themselves
            return None
        tokens = np.empty((len(ids), 2), np.int32)
        tokens[:, 0], tokens[:, 1] = ids, self._lengths[ids]
        return tokens

    def _agrees(self, backend: Tokenizer, added: dict[str, int]) -> bool:
        """Whether it gives all texts of up to three characters of each kind the same ids."""
        texts = ["".join(kinds) for n in (1, 2, 3) for kinds in product(_KINDS, repeat=n)]
        texts += [f"{token}{after}" for token in added for after in ("", " a", "\n", token)]
        for text, expected in zip(texts, backend.encode_batch_fast(texts, False), strict=True):
            found = self.tokens(text)
            if found is not None and found[:, 0].tolist() != expected.ids:
                return False
        return True


def _makes_all(model: Any, vocabulary: dict[str, int], merges: list[Any]) -> bool:
    """Whether rules come in the order of what they make, and make every token of its bytes."""
    pairs = (rule.split(" ") if isinstance(rule, str) else rule for rule in merges)
    made = [vocabulary.get(left + right, -1) for left, right in pairs]
    if min(made, default=0) < 0 or any(before > after for before, after in pairwise(made)):
        return False
    short_cut, model.ignore_merges = model.ignore_merges, False
    try:
        return all(
            len(tokens := model.tokenize(text)) == 1 and tokens[0].id == number
            for text, number in vocabulary.items()
        )
    finally:
        model.ignore_merges = short_cut


def _word_expression(facts: dict[str, Any]) -> str | None:
    """The expression that finds words, where the tokenizer is one that is understood here."""
    model, added = facts["model"], facts["added_tokens"]
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(model.get(name) for name in settings):
        return None
    if any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word")):
        return None
    texts = sorted(token["content"] for token in added)
    # Of two that begin alike the library takes the longer one, tiktoken any.
    alike = any(after.startswith(before) for before, after in pairwise(texts))
    # Tokens of two kinds would be looked for one kind after the other.
    if alike or len({token["normalized"] for token in added}) > 1:
        return None
    if facts["normalizer"] not in (None, {"type": "NFC"}):
        return None
    steps = facts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
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
