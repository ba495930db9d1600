r"""Questions with a picture and choices, in columns as of Robo2VLM.

{"question": "Which way does it move?", "choices": "['up', 'down']", "correct_answer": 1, "image": ...}

    user        <image> Which way does it move?\nA. up\nB. down
    assistant   B. down                                              (--answer-form)
"""

from __future__ import annotations

import ast
import io
import json
import string
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from data.errors import RowError
from data.rows.tool_calls import kind_of

AnswerForm = Literal["letter-and-text", "letter", "text"]
ANSWER_FORMS: tuple[AnswerForm, ...] = ("letter-and-text", "letter", "text")
LETTERS = string.ascii_uppercase
CHOICE_COLUMNS, RIGHT_COLUMNS = ("choices", "options"), ("correct_answer", "answer")


class Choices(NamedTuple):
    """The choices of a question, and which one is right."""

    texts: list[str]
    right: int

    @property
    def listed(self) -> str:
        """One a line, behind their letters."""
        return "\n".join(f"{LETTERS[i]}. {text}" for i, text in enumerate(self.texts))

    def answer(self, form: AnswerForm) -> str:
        """The right one, as it is to be said."""
        letter, text = LETTERS[self.right], self.texts[self.right]
        return {"letter-and-text": f"{letter}. {text}", "letter": letter, "text": text}[form]


def read_choices(value: Any, answer: Any) -> Choices:
    """Choices and the right one.

    Args:
        value: A list, or its text in JSON or Python.
        answer: An index (a number), or a letter or a choice's own text. Digits in text are an index only
            where no choice reads so; a number that is an index and another choice's text is ambiguous.

    Raises:
        RowError: no list, nothing that is one of them, or more than one of them.
    """
    if isinstance(value, str):
        value = _literal(value.strip())
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError("bad choices", f"they are {kind_of(value)}, expected a list")
    if any(choice is None or choice != choice for choice in value):
        raise RowError("bad choices", f"{list(value)!r:.120}: one of them is nothing")
    texts = [str(choice).strip() for choice in value]
    if not 1 <= len(texts) <= len(LETTERS) or len(set(texts)) < len(texts) or "" in texts:
        raise RowError(
            "bad choices",
            f"{texts!r:.120}: expected 1 to {len(LETTERS)}, all different, none empty",
        )
    if hasattr(answer, "item"):
        answer = answer.item()
    found = _meant(texts, answer)
    if len(found) > 1:
        both = " and ".join(f"{LETTERS[i]}. {texts[i]}" for i in sorted(found))
        raise RowError("ambiguous answer", f"{answer!r} may mean {both}; give its letter")
    if not found:
        last = LETTERS[len(texts) - 1]
        raise RowError(
            "answer outside the choices",
            f"{answer!r}; expected an index from 0 to {len(texts) - 1}, a letter from A to {last}, or "
            f"one of {texts!r:.120}",
        )
    return Choices(texts, found.pop())


def _literal(text: str) -> Any:
    """A list that is written as JSON, or as Python writes it.

    Raises:
        RowError: it is neither, or there is no comma between two texts, which Python takes for one (numpy
            prints them so).
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            value = ast.literal_eval(text)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        shown = f"{text[:80]!r} is no list, such as ['up', 'down']"
        raise RowError("bad choices", shown) from error
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    if (tokenize.STRING,) * 2 in pairwise(kinds):
        raise RowError("bad choices", f"{text[:80]!r}: a comma is missing between two texts")
    return value


def _meant(texts: Sequence[str], answer: Any) -> set[int]:
    """Every choice that an answer may mean."""
    if isinstance(answer, bool) or answer is None:
        return {texts.index(str(answer))} if str(answer) in texts else set()
    if isinstance(answer, (int, float)):
        found = {index for index, text in enumerate(texts) if text == str(answer)}
        whole = float(answer).is_integer() and 0 <= answer < len(texts)
        return found | ({int(answer)} if whole else set())
    if not isinstance(answer, str):
        return set()
    said = answer.strip()
    found = {index for index, text in enumerate(texts) if text == said}
    letter = LETTERS.find(said.upper()) if len(said) == 1 else -1
    if 0 <= letter < len(texts):
        found.add(letter)
    if not found and said.isdecimal() and int(said) < len(texts):
        found.add(int(said))
    return found


def named_column(row: Mapping[str, Any], given: str | None, usual: Sequence[str], flag: str) -> str:
    """The column of a row that a flag names, or the first usual one that is there.

    Raises:
        RowError: it is not there; those that are get listed.
    """
    name = given or next((name for name in usual if row.get(name) is not None), usual[0])
    if name not in row:
        columns = ", ".join(map(str, list(row)[:20])) or "none"
        raise RowError("missing column", f"no column {name!r} ({flag}); the row has {columns}")
    return name
