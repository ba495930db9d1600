"""Exact-match accuracy on held-out conversations whose last assistant turn is the right answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data.errors import DataError, RowError
from data.images.processor import ImageProcessor
from data.rows.choices import Choices
from data.rows.conversation import Conversation
from data.rows.converters import FormatOptions, row_choices
from data.rows.registry import Converter, converter, detect_format
from data.sources.chunks import read_chunk
from data.sources.files import resolve_files
from data.sources.readers import file_chunks
from post_training.errors import SetupError
from post_training.inference.backends import Backend
from post_training.inference.choices import chosen
from post_training.inference.pictures import Fields, SeenPrompts
from post_training.inference.prompts import Prompts


@dataclass(frozen=True)
class Question:
    """One row of an evaluation."""

    place: str
    """`file:line` or `file, row n`."""
    prompt: Conversation
    """The conversation up to the answer, with the row's tools and template variables."""
    answer: str
    """What the last assistant turn says."""
    kind: str
    """The row's `kind` field, or empty."""
    choices: Choices | None = None
    """Of which the answer is one, and which of them is right."""
    file: str = ""
    """That it is in; relative paths of pictures are meant beside it."""


def read_questions(
    files: Sequence[str],
    options: FormatOptions | None = None,
    kind_key: str = "kind",
    *,
    skip: bool = False,
) -> list[Question]:
    """Read every row of `files`; formats are those of training data.

    Args:
        files: of rows.
        options: names of columns.
        kind_key: the column with a row's kind.
        skip: leave out rows that cannot be read, which have been counted and told elsewhere.

    Raises:
        DataError: a row cannot be read or does not end with an assistant turn, or there is none.
    """
    questions: list[Question] = []
    options = options or FormatOptions()
    for number, path in enumerate(resolve_files(list(files), "--data")):
        convert: Converter | None = None
        for chunk in file_chunks(path, number):
            for raw in read_chunk(chunk):
                try:
                    if raw.error is not None:
                        raise raw.error
                    if convert is None or not isinstance(raw.row, Mapping):
                        name = detect_format(raw.row, options)
                        convert = converter(name, options)
                    conversation = convert(raw.row)
                except (RowError, DataError) as error:
                    if skip and isinstance(error, RowError):
                        continue
                    raise DataError(f"{raw.place}: {error}") from error
                except RecursionError as error:
                    raise DataError(f"{raw.place}: the values are nested too deeply") from error
                *messages, last = conversation.messages or [{}]
                if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
                    raise DataError(f"{raw.place}: the last message is not an assistant's answer")
                prompt = Conversation(
                    messages,
                    conversation.tools,
                    variables=conversation.variables,
                    pictures=conversation.pictures,
                )
                kind = str(raw.row.get(kind_key) or "")
                choices = row_choices(raw.row, options) if name == "choices" else None
                questions.append(
                    Question(raw.place, prompt, last["content"], kind, choices, raw.file)
                )
    if not questions:
        raise DataError(f"--data {' '.join(files)}: there are no rows")
    return questions


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    rows: list[dict[str, Any]]
    """For each question: place, kind, expected, answer, correct, truncated."""
    max_new_tokens: int
    """Answers of so many tokens were cut there: `truncated`."""

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Correct answers and questions of each kind; of all under `""`, which comes last."""
        table: dict[str, list[int]] = {}
        for row in self.rows:
            for kind in {row["kind"], ""}:
                counts = table.setdefault(kind, [0, 0])
                counts[0] += row["correct"]
                counts[1] += 1
        everything = table.pop("")
        return {kind: (a, b) for kind, (a, b) in sorted(table.items())} | {
            "": (everything[0], everything[1])
        }

    def facts(self) -> dict[str, Any]:
        """What is written to a file."""
        return {
            "accuracy": self.accuracy,
            "correct": sum(row["correct"] for row in self.rows),
            "rows": len(self.rows),
            "truncated": self.truncated,
            "max_new_tokens": self.max_new_tokens,
            "answers": self.rows,
        }

    @property
    def accuracy(self) -> float:
        """Correct answers over all questions."""
        return sum(row["correct"] for row in self.rows) / len(self.rows)

    @property
    def truncated(self) -> int:
        """Answers that were cut."""
        return sum(row["truncated"] for row in self.rows)

    def table(self) -> str:
        """The counts as aligned text, and how many answers were cut, if any."""
        lines = [f"{'kind':<24} {'correct':>8} {'rows':>6} {'accuracy':>9}"]
        for kind, (correct, rows) in self.by_kind().items():
            lines.append(f"{kind or 'all':<24} {correct:>8} {rows:>6} {correct / rows:>9.1%}")
        if self.truncated:
            lines.append(
                f"{self.truncated} of {len(self.rows)} answers reached --max-new-tokens "
                f"{self.max_new_tokens}"
            )
        return "\n".join(lines)


def extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The part of an answer that is compared: all of it, or the last match's first group.

    Returns:
        Stripped text; None where the pattern does not match.
    """
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    return (match[1] if pattern.groups else match[0]).strip()


@contextmanager
def _at(question: Question) -> Iterator[None]:
    """Name the row that cannot be asked."""
    try:
        yield
    except RowError as error:
        raise DataError(f"{question.place}: {error}") from error


def encode_questions(
    prompts: Prompts,
    questions: Sequence[Question],
    images: Callable[[], ImageProcessor | str] = lambda: "what is to answer is shown none",
) -> tuple[list[list[int]], list[Fields]]:
    """Token ids of each prompt, and what makes that which a model that sees takes beside them.

    Args:
        prompts: writes them.
        questions: to be asked.
        images: opens what makes pixels, or says why there is nothing.

    Raises:
        DataError: the chat template refuses a question, or it has pictures that cannot be shown.
    """
    found: list[list[int]] = []
    seen: list[Fields] = []
    see: SeenPrompts | None = None
    for question in questions:
        with _at(question):
            ids = prompts.encode(question.prompt)
            fields: Fields = dict
            if question.prompt.pictures:
                see = see or SeenPrompts(images())
                ids, beside = see.expand(ids, question.prompt.pictures, question.file)
                fields = _at(question)(beside)
        found.append(ids)
        seen.append(fields)
    return found, seen


def evaluate(
    backend: Backend, questions: Sequence[Question], pattern: re.Pattern[str] | None = None
) -> Scores:
    """Let the model answer every question and compare.

    Args:
        backend: what answers.
        questions: every one counts.
        pattern: compares only what it finds, in the right answer and in the model's.

    Raises:
        SetupError: the pattern does not match a right answer.
        DataError: the chat template refuses a question.
    """
    expected = [
        extract(question.answer, pattern)
        if pattern or question.choices is None
        else question.choices.answer("letter-and-text")
        for question in questions
    ]
    for question, value in zip(questions, expected, strict=True):
        if value is None and pattern is not None:
            raise SetupError(
                f"{question.place}: --answer-pattern finds nothing in {question.answer!r}"
            )
    prompts, seen = encode_questions(backend.prompts, questions, backend.images)
    longest = backend.sampling.max_new_tokens
    rows = []
    answers = backend.generate(prompts, seen)
    for question, value, ids in zip(questions, expected, answers, strict=True):
        text = backend.tokenizer.decode(ids, skip_special_tokens=True)
        if question.choices is not None and pattern is None:
            correct = chosen(text, question.choices.texts) == question.choices.right
        else:
            correct = extract(text, pattern) == value
        rows.append(
            {
                "place": question.place,
                "kind": question.kind,
                "expected": value,
                "answer": text,
                "correct": correct,
                "truncated": len(ids) >= longest,
            }
        )
    return Scores(rows, longest)
