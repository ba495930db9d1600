r"""Which of the choices an answer takes: the one place that says how a model's words are read.

1. Thinking is no answer: what stands before the last `</think>` is left out; a block that is never closed
   leaves nothing.
2. Of what is left the last `\boxed{...}` counts, else the last `<answer>...</answer>`, else what follows
   the last "answer is" or "answer:", else all of it. Marks of emphasis and white space are left out.
3. A letter at its beginning is the answer: alone, or with `.`, `)` or `:` behind it, also in brackets:
   `B`, `(b)`, `B. the red one`. A small one counts only alone, in brackets or with a mark behind it. Behind
   it may stand the text of that choice or nothing of another one: `B. red` where A is red is no answer;
   behind a letter on a line of its own anything may.
4. Else the text of a choice, without regard to case, white space and a full stop; else the one choice whose
   text stands in it as whole words, where no other's does (one inside another's text does not count).
5. Else none: the answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.rows.choices import LETTERS

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
_LETTER = re.compile(
    r"(?:\(([A-Za-z])\)|([A-Za-z])(?:[.):](?=\s|$)|(?=\s*$|\s*\n))|([A-Z])(?=\s|$))[.):]?\s*"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")


def chosen(answer: str, texts: Sequence[str]) -> int | None:
    """The number of the choice that an answer takes; None where it takes none, or more than one.

    Args:
        answer: What the model said.
        texts: The choices.
    """
    said = final_answer(answer)
    found = _LETTER.match(said)
    if found and not (found[3] and not _alone(said, found, texts)):
        letter = LETTERS.index(next(group for group in found.groups() if group).upper())
        alone = "\n" in found[0]  # on a line of its own: what follows explains it
        rest = "" if alone else _plain(said[found.end() :])
        named = _by_text(rest, texts)
        return letter if letter < len(texts) and named in (None, letter) else None
    return _by_text(_plain(said), texts)


def final_answer(answer: str) -> str:
    """The part of an answer that counts: rules 1 and 2."""
    said = answer.rpartition("</think>")[2]
    if "<think>" in said:
        return ""
    if boxes := _BOXED.findall(said):
        said = _WRAPPED.sub(r"\1", boxes[-1])
    elif tags := _TAGGED.findall(said):
        said = tags[-1]
    elif places := list(_SAID.finditer(said)):
        said = said[places[-1].end() :]
    return said.replace("*", "").replace("`", "").strip()


def _alone(said: str, found: re.Match[str], texts: Sequence[str]) -> bool:
    """Whether a capital without a mark is a letter and no word: `A` may begin a sentence."""
    rest = _plain(said[found.end() :])
    return not rest or rest in map(_plain, texts)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").strip().casefold()


def _by_text(said: str, texts: Sequence[str]) -> int | None:
    plain = [_plain(text) for text in texts]
    if said in plain:
        return plain.index(said) if plain.count(said) == 1 else None
    rest, found = said, []
    # The longest first, and taken out: "dark red" does not say "red".
    for index in sorted(range(len(plain)), key=lambda index: -len(plain[index])):
        rest, count = re.subn(rf"(?<!\w){re.escape(plain[index])}(?!\w)", "\0", rest)
        found += [index] * bool(count)
    return found[0] if len(found) == 1 else None
