"""The registry of row formats: each is a function from a row to a conversation.

To add a format for yourself, write such a function and name it with
``--conversation-format package.module:function``; it gets the row and returns either a
``Conversation`` (with ``trained``, one truth value a message, where only some answers are to be
trained) or a list of OpenAI messages. To add one here, write it in ``data/rows/converters.py`` and enter it
in FORMATS.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import DataError, RowError
from data.rows.choices import ANSWER_FORMS
from data.rows.columns import read_all, without
from data.rows.conversation import Conversation
from data.rows.converters import (
    ANSWER_COLUMNS,
    MESSAGE_COLUMNS,
    QUESTION_COLUMNS,
    FormatOptions,
    Row,
    alpaca_row,
    choices_row,
    columns_of,
    fields_row,
    messages_row,
    preference_row,
    question_row,
    template_variables,
    unfolded,
)
from data.rows.plain import PLAIN_FORMATS
from data.rows.user_converter import UserConverter

Converter = Callable[[Row], Conversation]


@dataclass(frozen=True)
class NamedDataset:
    """How to read a well-known dataset of the hub.

    Attributes:
        format: Its row format.
        options: Its columns.
        split: The split to train on, where it is not ``train``.
        template: A chat template for it, for tokenizers that have none.
    """

    format: str
    options: FormatOptions = field(default_factory=FormatOptions)
    split: str = "train"
    template: str | None = None


# For base models, whose tokenizers have no template: the roles in words, an answer ended by the text's end.
_BARE_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ 'Assistant:\n' + message.content + eos_token + '\n' }}{% else %}"
    "{{ message.role | capitalize + ':\n' + message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

NAMED_DATASETS: dict[str, NamedDataset] = {
    "Open-Orca/OpenOrca": NamedDataset(
        "fields",
        FormatOptions("system_prompt", "question", None, "response"),
        template=_BARE_TEMPLATE,
    ),
    "Open-Orca/SlimOrca": NamedDataset("sharegpt"),
    "nvidia/Daring-Anteater": NamedDataset("sharegpt"),
    "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered": NamedDataset("sharegpt"),
    "HuggingFaceH4/ultrachat_200k": NamedDataset("messages", split="train_sft"),
}

FORMATS: dict[str, Callable[[Row, FormatOptions], Conversation]] = {
    "messages": messages_row,
    "sharegpt": messages_row,
    "alpaca": alpaca_row,
    "question": question_row,
    "preference": preference_row,
    "fields": fields_row,
    "choices": choices_row,
}
FORMAT_NAMES = (*FORMATS, *PLAIN_FORMATS)


_PAIR_KEYS = ("system_key", "prompt_key", "query_key", "response_key")
# The fields of FormatOptions that each format reads; a converter of the user's reads none.
_KEYS = {
    "messages": ("system_key", "messages_key", "image_keys"),
    "sharegpt": ("system_key", "messages_key", "image_keys"),
    "alpaca": _PAIR_KEYS,
    "question": _PAIR_KEYS,
    "preference": ("system_key", "prompt_key"),
    "fields": _PAIR_KEYS,
    "choices": ("system_key", "prompt_key", "choice_key", "answer_key", "image_keys"),
    "text": ("response_key",),
    "tokens": (),
}
_COLUMN_KEYS = (*_PAIR_KEYS, "messages_key", "choice_key", "answer_key", "image_keys")


def detect_format(row: Any, options: FormatOptions) -> str:
    """The name of the format that a row is in.

    Raises:
        DataError: none fits; the message names the columns that were found.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {type(row).__name__}, not an object with columns.")
    row = without(row, options.ignore_columns)
    with suppress(RowError):  # told when the row is read
        row = unfolded(row)
    if options.messages_key is not None:
        return "messages"
    asks = any(name in row for name in QUESTION_COLUMNS)
    shows = options.image_keys is not None and not any(row.get(n) for n in MESSAGE_COLUMNS)
    if options.names_choices or shows or (asks and {"choices", "correct_answer"} <= row.keys()):
        return "choices"
    answers = options.query_key or options.response_key or "output" in row
    if options.names_fields and ("chosen" not in row or answers):
        return "fields"
    if "chosen" in row:
        return "preference"
    for name in MESSAGE_COLUMNS:
        if row.get(name) is not None:
            items = row[name]
            first = items[0] if isinstance(items, Sequence) and items else None
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "instruction" in row and any(name in row for name in ANSWER_COLUMNS):
        return "alpaca"
    if any(n in row for n in QUESTION_COLUMNS) and any(n in row for n in ANSWER_COLUMNS):
        return "question"
    if row.get("input_ids") is not None:
        return "tokens"
    if isinstance(row.get("text"), str):
        return "text"
    raise DataError(
        f"cannot tell the format of rows with columns {columns_of(row)}. Expected one of "
        f"{', '.join(MESSAGE_COLUMNS)}; 'chosen'; 'text'; 'input_ids'; or one of "
        f"{', '.join(QUESTION_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}. "
        "Name the columns with --prompt-key and --response-key, "
        "or --messages-key, or give --conversation-format."
    )


def converter(name: str, options: FormatOptions) -> Converter:
    """The function of a format, by its name in FORMATS or as ``package.module:function``.

    Raises:
        DataError: there is no such format or function, or it has no use for an option.
    """
    require_keys_of_use(name, options)
    if name in FORMATS:
        convert = FORMATS[name]

        def read(row: Row) -> Conversation:
            conversation = convert(row, options)
            variables = template_variables(row)
            return replace(conversation, variables=variables) if variables else conversation

        ignored, strict = options.ignore_columns, options.strict_columns
        return lambda row: read_all(unfolded(without(row, ignored)), read, ignored, strict)
    if name in PLAIN_FORMATS:
        raise DataError(f"rows of the format {name} are no conversations.")
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise DataError(
            f"--conversation-format {name}: unknown; known are {', '.join(FORMAT_NAMES)}, or "
            "package.module:function for a function of your own."
        )
    if str(Path.cwd()) not in sys.path:
        # A script has its own folder there; workers are given all of it.
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the module does when it is imported
        raise DataError(
            f"--conversation-format {name}: {error or type(error).__name__}. The module must be "
            "importable from here."
        ) from error
    if not callable(function):
        kind = type(function).__name__
        raise DataError(f"--conversation-format {name}: is a {kind}, expected a function of a row.")
    user = UserConverter(name, function)
    return lambda row: read_all(
        row, user, options.ignore_columns, options.strict_columns, tracked=False
    )


def require_keys_of_use(name: str, options: FormatOptions) -> None:
    """Refuse options that a format has no use for.

    Raises:
        DataError: there is one.
    """
    if options.answer_form != ANSWER_FORMS[0] and name != "choices":
        raise DataError(
            f"--answer-form {options.answer_form}: rows of the format {name} have no choices. Leave it out."
        )
    read = _KEYS.get(name, ())
    for key in _COLUMN_KEYS:
        column = getattr(options, key)
        if column is not None and key not in read:
            flags = ", ".join(_flag(other) for other in read) or "no column flag"
            column = column if isinstance(column, str) else " ".join(column)
            raise DataError(
                f"{_flag(key)} {column}: rows of the format {name} are read without it "
                f"(that format takes {flags}). Leave it out, or give another --conversation-format."
            )


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def converter_source(name: str) -> bytes:
    """The file of the module that a user's converter is in; empty for one of FORMATS.

    Raises:
        DataError: there is no such function.
    """
    if name in FORMAT_NAMES:
        return b""
    converter(name, FormatOptions())
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return Path(file).read_bytes() if file else b""
