"""The row formats: each is a function from a row and column names to a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import RowError
from data.rows.choices import (
    CHOICE_COLUMNS,
    RIGHT_COLUMNS,
    AnswerForm,
    Choices,
    named_column,
    read_choices,
)
from data.rows.conversation import Conversation, reserved_in
from data.rows.messages import content_of, conversation_from_messages, role_of
from data.rows.pictures import IMAGE_COLUMNS, column_pictures, with_parts
from data.rows.tool_calls import from_json

Row = Mapping[str, Any]

QUESTION_COLUMNS = ("question", "prompt", "instruction", "query", "problem")
ANSWER_COLUMNS = ("answer", "response", "output", "completion", "solution")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
_TOOL_COLUMNS = ("tools", "functions", "tool_defs")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True)
class FormatOptions:
    """Column names for the ``fields`` and ``messages`` formats; None for the usual names.

    Attributes:
        system_key: Column with a system prompt.
        prompt_key: Column with the question; ``instruction`` by default.
        query_key: Column that is appended to the question, on a line of its own.
        response_key: Column with the answer; ``output`` by default.
        messages_key: Column with a list of messages.
        ignore_columns: Columns and fields of messages that may be left out.
        strict_columns: Whether all others have to be read.
        choice_key: Column with the choices of a question.
        answer_key: Column with the right one, or with the answer where there are no choices.
        image_keys: Columns with pictures.
        answer_form: How the right choice is said.
    """

    system_key: str | None = None
    prompt_key: str | None = None
    query_key: str | None = None
    response_key: str | None = None
    messages_key: str | None = None
    ignore_columns: tuple[str, ...] = ()
    strict_columns: bool = False
    choice_key: str | None = None
    answer_key: str | None = None
    image_keys: tuple[str, ...] | None = None
    answer_form: AnswerForm = "letter-and-text"

    @property
    def names_choices(self) -> bool:
        """Whether a column of questions with choices was named."""
        return bool(self.choice_key or self.answer_key)

    @property
    def names_fields(self) -> bool:
        """Whether a question or answer column was named."""
        return bool(self.prompt_key or self.response_key or self.query_key)

    @property
    def names_nothing(self) -> bool:
        """Whether no column was named."""
        named = self.names_fields or self.system_key or self.messages_key
        return not (named or self.names_choices or self.image_keys)


def unfolded(row: Row) -> Row:
    """A row of OpenAI's preference data, whose prompt lies in ``input.messages``, as one of ours.

    Raises:
        RowError: a column is in ``input`` and beside it, with other values.
    """
    inner = row.get("input")
    if not isinstance(inner, Mapping) or not inner.get("messages"):
        return row
    outer = {name: value for name, value in row.items() if name != "input"}
    for names, ours in (
        (("preferred_output", "output"), "chosen"),
        (("non_preferred_output",), "rejected"),
    ):
        name = next((name for name in names if outer.get(name)), None)
        if name is not None:
            outer[ours] = outer.pop(name)
    for name, value in inner.items():
        if outer.setdefault(name, value) != value:
            raise RowError("bad input", f"{name!r} in 'input' differs from the column of that name")
    return outer


def messages_row(row: Row, options: FormatOptions) -> Conversation:
    """OpenAI ``messages`` or ShareGPT ``conversations``."""
    column = options.messages_key
    if column is None:
        column = next((name for name in MESSAGE_COLUMNS if row.get(name) is not None), "messages")
    if column not in row:
        flag = "--messages-key" if options.messages_key else "--conversation-format"
        raise _missing(row, column, flag)
    pictures = _pictures(row, options)
    messages = with_parts(row[column], pictures[0] or ())
    return conversation_from_messages(
        messages, _tools(row), _system(row, options), column, pictures
    )


def choices_row(row: Row, options: FormatOptions) -> Conversation:
    """A question with pictures: a column of choices and one with the right one, or an answer alone."""
    prompt = named_column(row, options.prompt_key, QUESTION_COLUMNS, "--prompt-key")
    question = _text(row, prompt, "--prompt-key", missing_is_empty=False)
    if not isinstance(question, str):
        raise RowError(
            "bad content", f"column {prompt!r} is {type(question).__name__}, expected text"
        )
    right = named_column(row, options.answer_key, RIGHT_COLUMNS, "--answer-key")
    choices = row_choices(row, options)
    if choices is not None:
        question = f"{question}\n{choices.listed}"
        answer = choices.answer(options.answer_form)
    else:
        value = row[right]
        answer = "" if value is None or value != value else str(value)  # NaN: nothing, of pandas
        if not answer.strip():
            raise RowError("no content", f"column {right!r} has no answer")
    pictures, where = _pictures(row, options)
    user = {"role": "user", "content": question}
    (placed,) = with_parts([user], pictures or ())
    if placed is user:  # no text says where they belong
        parts = [{"type": "image"} for _ in pictures or ()]
        placed = {**user, "content": [*parts, {"type": "text", "text": question}]}
    pair = [placed, {"role": "assistant", "content": answer}]
    return conversation_from_messages(pair, None, _system(row, options), "row", (pictures, where))


def row_choices(row: Row, options: FormatOptions) -> Choices | None:
    """The choices of a row of the format `choices`; None where it has none.

    Raises:
        RowError: they and the answer do not fit.
    """
    if not options.choice_key and not any(row.get(name) is not None for name in CHOICE_COLUMNS):
        return None
    column = named_column(row, options.choice_key, CHOICE_COLUMNS, "--choice-key")
    right = named_column(row, options.answer_key, RIGHT_COLUMNS, "--answer-key")
    return read_choices(row[column], row[right])


def _pictures(row: Row, options: FormatOptions) -> tuple[list[Any] | None, str]:
    named = options.image_keys is not None
    return column_pictures(row, options.image_keys or IMAGE_COLUMNS, named)


def alpaca_row(row: Row, options: FormatOptions) -> Conversation:
    """``instruction``, ``input`` (or ``context``), ``output`` (or ``response``), ``history``."""
    prompt = options.prompt_key or "instruction"
    response = options.response_key or next(
        (name for name in ("output", *ANSWER_COLUMNS) if name in row), "output"
    )
    query = options.query_key or next((n for n in ("input", "context") if n in row), None)
    return _pair(row, options, prompt, query, response)


def fields_row(row: Row, options: FormatOptions) -> Conversation:
    """Columns named by --prompt-key, --query-key, --response-key and --system-key."""
    prompt, response = options.prompt_key or "instruction", options.response_key or "output"
    return _pair(row, options, prompt, options.query_key, response)


def question_row(row: Row, options: FormatOptions) -> Conversation:
    """A question column and an answer column of any usual names."""
    prompt = options.prompt_key or _first(row, QUESTION_COLUMNS)
    response = options.response_key or _first(row, ANSWER_COLUMNS)
    return _pair(row, options, prompt, options.query_key, response)


def preference_row(row: Row, options: FormatOptions) -> Conversation:
    """``chosen`` of a preference row: messages, one message, or text.

    The prompt is put before it, unless it is the whole conversation already.
    """
    row.get("rejected")  # known, and of no use here
    chosen = row.get("chosen")
    before = _prompt_of(row, options)
    if isinstance(chosen, str):
        parts = _TRANSCRIPT.split(chosen)
        if before is None and len(parts) > 2:
            if parts[0].strip():
                raise RowError("bad chosen", "'chosen' has text before its first 'Human:'")
            pairs = zip(parts[1::2], parts[2::2], strict=True)
            roles = {"Human": "user", "Assistant": "assistant"}
            chosen = [{"role": roles[who], "content": text.strip()} for who, text in pairs]
        else:
            chosen = [{"role": "assistant", "content": chosen}]
    elif isinstance(chosen, Mapping):
        chosen = [chosen]
    if not isinstance(chosen, Sequence) or isinstance(chosen, bytes):
        raise RowError("bad chosen", f"'chosen' is {type(chosen).__name__}, expected messages")
    whole = _with_prompt(before, list(chosen))
    return conversation_from_messages(whole, _tools(row), _system(row, options), "chosen")


def _prompt_of(row: Row, options: FormatOptions) -> list[Any] | None:
    """The prompt of a preference row as messages; None where there is none."""
    if options.prompt_key is not None:
        before = _text(row, options.prompt_key, "--prompt-key", missing_is_empty=True)
    else:
        names = (*MESSAGE_COLUMNS, "prompt", "question", "instruction")
        before = next((row[name] for name in names if row.get(name)), None)
    if isinstance(before, str):
        return [{"role": "user", "content": before}] if before else None
    if isinstance(before, Mapping):
        return [before]
    if before is not None and not isinstance(before, Sequence):
        raise RowError("bad prompt", f"the prompt is {type(before).__name__}, expected messages")
    return list(before) if before else None


def _with_prompt(before: list[Any] | None, chosen: list[Any]) -> list[Any]:
    """The prompt and the chosen messages as one conversation.

    Raises:
        RowError: there is no prompt, or it cannot be told how the two belong together.
    """
    roles = [role_of(message) for message in chosen]
    start = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    asks = roles[start : start + 1] == ["user"]
    if before is None:
        if "user" not in roles:
            columns = ", ".join((*MESSAGE_COLUMNS, "prompt", "question", "instruction"))
            raise RowError(
                "no prompt",
                f"'chosen' has no user turn and there is none in {columns} (--prompt-key)",
            )
        return chosen
    said = [_said(message) for message in chosen]
    asked = [_said(message) for message in before if role_of(message) != "system"]
    open_question = bool(asked) and asked[-1][0] == "user"
    repeated = said[start : start + len(asked)] == asked or (open_question and asked[-1] in said)
    if not repeated:
        if not asks:
            return [*chosen[:start], *before, *chosen[start:]]
        if not open_question:
            raise RowError(
                "bad prompt",
                "'chosen' begins with a user turn, yet not with the messages of the prompt",
            )
    # The whole conversation; only the system prompt may stand in the prompt alone.
    systems = [m for m in before if role_of(m) == "system"] if start == 0 else []
    return [*systems, *chosen]


def _said(message: Any) -> tuple[str | None, Any]:
    return role_of(message), content_of(message) if isinstance(message, Mapping) else None


def _pair(
    row: Row,
    options: FormatOptions,
    prompt: str,
    query: str | None,
    response: str,
) -> Conversation:
    question = _text(row, prompt, "--prompt-key", missing_is_empty=False)
    answer = _text(row, response, "--response-key", missing_is_empty=False)
    tools, system, more = _tools(row), _system(row, options), ""
    history = _history(row) if {prompt, query, response}.isdisjoint(("history",)) else []
    if query is not None:
        more = _text(row, query, "--query-key", missing_is_empty=options.query_key is None)
        if not isinstance(more, str):
            raise RowError("bad content", f"column {query!r} is not text")
    if isinstance(question, list) and isinstance(answer, list):
        extra = repr(query) if more else "'history'" if history else ""
        if extra:
            what = f"{prompt!r} holds messages, which leave no place for column {extra}"
            raise RowError("bad content", f"{what}: put it into them")
        return conversation_from_messages([*question, *answer], tools, system, prompt)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError("bad content", f"{prompt!r} and {response!r} are not both text")
    question = "\n".join(part for part in (question, more) if part)
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not history and not tools and not system:
        return Conversation(pair, None, [False, True])
    return conversation_from_messages([*history, *pair], tools, system, "row")


def _history(row: Row) -> list[Any]:
    """The messages of ``history``: earlier questions with their answers, or messages.

    Raises:
        RowError: it is neither.
    """
    history = row.get("history")
    if isinstance(history, str) and history.strip():
        history = from_json(history, "bad history", "'history'")
    if not history:
        return []
    if not isinstance(history, Sequence):
        raise RowError("bad history", f"'history' is {type(history).__name__}, expected a list")
    messages: list[Any] = []
    for pair in history:
        if role_of(pair) is not None:
            messages.append(pair)
            continue
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("bad history", "'history' holds something that is not a pair of texts")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _tools(row: Row) -> Any:
    """The tools on offer: the first of _TOOL_COLUMNS that holds some."""
    return next((row[name] for name in _TOOL_COLUMNS if row.get(name)), None)


def template_variables(row: Row) -> Mapping[str, Any]:
    """The ``chat_template_kwargs`` of a row.

    Raises:
        RowError: they are no object, or name what only the row itself can say.
    """
    value = row.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = from_json(value, "bad template variables", "'chat_template_kwargs'")
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("bad template variables", "'chat_template_kwargs' is no object")
    if taken := reserved_in({name: item for name, item in value.items() if item is not None}):
        raise RowError(
            "bad template variables",
            f"'chat_template_kwargs' has {', '.join(taken)}, set by the rendering itself",
        )
    return {name: item for name, item in value.items() if item is not None}


def _text(row: Row, column: str, flag: str, missing_is_empty: bool) -> Any:
    if column not in row:
        raise _missing(row, column, flag)
    value = row[column]
    if value is None and missing_is_empty:
        return ""
    if not isinstance(value, (str, list)):
        kind = "null" if value is None else type(value).__name__
        raise RowError("bad content", f"column {column!r} is {kind}, expected text")
    return value


def _system(row: Row, options: FormatOptions) -> Any:
    if options.system_key is not None:
        if options.system_key not in row:
            raise _missing(row, options.system_key, "--system-key")
        return row[options.system_key]
    return next((row[name] for name in _SYSTEM_COLUMNS if row.get(name)), None)


def _first(row: Row, columns: Sequence[str]) -> str:
    for name in columns:
        if row.get(name) is not None:
            return name
    raise RowError("missing column", f"none of {', '.join(columns)} in columns {columns_of(row)}")


def _missing(row: Row, column: str, flag: str) -> RowError:
    return RowError(
        "missing column", f"no column {column!r} ({flag}); the row has {columns_of(row)}"
    )


def columns_of(row: Row) -> str:
    """The names of a row's columns, for messages."""
    names = (name if str(name).isprintable() else repr(name) for name in list(row)[:20])
    return ", ".join(map(str, names)) or "none"
