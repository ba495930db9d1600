"""The registry of row formats: each is a function from a row to a conversation.

To add a format for yourself, write such a function and name it with
``--conversation-format package.module:function``; it gets the row and returns either a
``Conversation`` (with ``trained``, one truth value a message, where only some answers are to be
trained) or a list of OpenAI messages. To add one here, write it and enter it in FORMATS.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.conversation import Conversation
from data.errors import DataError, RowError
from data.messages import content_of, conversation_from_messages, role_of

Row = Mapping[str, Any]
Converter = Callable[[Row], Conversation]


@dataclass(frozen=True)
class FormatOptions:
    """Column names for the ``fields`` and ``messages`` formats; None for the usual names.

    Attributes:
        system_key: Column with a system prompt.
        prompt_key: Column with the question; ``instruction`` by default.
        query_key: Column that is appended to the question, on a line of its own.
        response_key: Column with the answer; ``output`` by default.
        messages_key: Column with a list of messages.
    """

    system_key: str | None = None
    prompt_key: str | None = None
    query_key: str | None = None
    response_key: str | None = None
    messages_key: str | None = None

    @property
    def names_fields(self) -> bool:
        """Whether a question or answer column was named."""
        return bool(self.prompt_key or self.response_key or self.query_key)


@dataclass(frozen=True)
class NamedDataset:
    """How to read a well-known dataset of the hub.

    Attributes:
        format: Its row format.
        options: Its columns.
        split: The split to train on, where it is not ``train``.
    """

    format: str
    options: FormatOptions = field(default_factory=FormatOptions)
    split: str = "train"


NAMED_DATASETS: dict[str, NamedDataset] = {
    "Open-Orca/OpenOrca": NamedDataset(
        "fields", FormatOptions("system_prompt", "question", None, "response")
    ),
    "Open-Orca/SlimOrca": NamedDataset("sharegpt"),
    "nvidia/Daring-Anteater": NamedDataset("sharegpt"),
    "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered": NamedDataset("sharegpt"),
    "HuggingFaceH4/ultrachat_200k": NamedDataset("messages", split="train_sft"),
}

QUESTION_COLUMNS = ("question", "prompt", "instruction", "query", "problem")
ANSWER_COLUMNS = ("answer", "response", "output", "completion", "solution")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def _messages(row: Row, options: FormatOptions) -> Conversation:
    """OpenAI ``messages`` or ShareGPT ``conversations``."""
    column = options.messages_key
    if column is None:
        column = next((name for name in MESSAGE_COLUMNS if row.get(name) is not None), "messages")
    if column not in row:
        flag = "--messages-key" if options.messages_key else "--conversation-format"
        raise _missing(row, column, flag)
    return conversation_from_messages(row[column], row.get("tools"), _system(row, options), column)


def _alpaca(row: Row, options: FormatOptions) -> Conversation:
    """``instruction``, ``input`` (or ``context``), ``output`` (or ``response``), ``history``."""
    prompt = options.prompt_key or "instruction"
    response = options.response_key or next(
        (name for name in ("output", *ANSWER_COLUMNS) if name in row), "output"
    )
    query = options.query_key or next((n for n in ("input", "context") if n in row), None)
    history = row.get("history")
    if history is not None and not isinstance(history, Sequence):
        raise RowError("bad history", f"'history' is {type(history).__name__}, expected a list")
    messages: list[dict[str, Any]] = []
    for pair in history or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("bad history", "'history' holds something that is not a pair of texts")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return _pair(row, options, prompt, query, response, messages)


def _fields(row: Row, options: FormatOptions) -> Conversation:
    """Columns named by --prompt-key, --query-key, --response-key and --system-key."""
    prompt, response = options.prompt_key or "instruction", options.response_key or "output"
    return _pair(row, options, prompt, options.query_key, response, [])


def _question(row: Row, options: FormatOptions) -> Conversation:
    """A question column and an answer column of any usual names."""
    prompt = options.prompt_key or _first(row, QUESTION_COLUMNS)
    response = options.response_key or _first(row, ANSWER_COLUMNS)
    return _pair(row, options, prompt, options.query_key, response, [])


def _preference(row: Row, options: FormatOptions) -> Conversation:
    """``chosen`` of a preference row: messages, one message, or text; ``rejected`` is ignored.

    The prompt is put before it, unless it is the whole conversation already.
    """
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
    return conversation_from_messages(whole, row.get("tools"), _system(row, options), "chosen")


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


FORMATS: dict[str, Callable[[Row, FormatOptions], Conversation]] = {
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "question": _question,
    "preference": _preference,
    "fields": _fields,
}


_PAIR_KEYS = ("system_key", "prompt_key", "query_key", "response_key")
# The fields of FormatOptions that each format reads; a converter of the user's reads none.
_KEYS = {
    "messages": ("system_key", "messages_key"),
    "sharegpt": ("system_key", "messages_key"),
    "alpaca": _PAIR_KEYS,
    "question": _PAIR_KEYS,
    "preference": ("system_key", "prompt_key"),
    "fields": _PAIR_KEYS,
}


def detect_format(row: Any, options: FormatOptions) -> str:
    """The name of the format that a row is in.

    Raises:
        DataError: none fits; the message names the columns that were found.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {type(row).__name__}, not an object with columns.")
    if options.messages_key is not None:
        return "messages"
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
    raise DataError(
        f"cannot tell the format of rows with columns {_columns(row)}. Expected one of "
        f"{', '.join(MESSAGE_COLUMNS)}; 'chosen'; or one of {', '.join(QUESTION_COLUMNS)} with one "
        f"of {', '.join(ANSWER_COLUMNS)}. Name the columns with --prompt-key and --response-key, "
        "or --messages-key, or give --conversation-format."
    )


def converter(name: str, options: FormatOptions) -> Converter:
    """The function of a format, by its name in FORMATS or as ``package.module:function``.

    Raises:
        DataError: there is no such format or function, or it has no use for an option.
    """
    _require_keys_of_use(name, options)
    if name in FORMATS:
        convert = FORMATS[name]
        return lambda row: convert(row, options)
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise DataError(
            f"--conversation-format {name}: unknown; known are {', '.join(FORMATS)}, or "
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
    return _UserConverter(name, function)


def _require_keys_of_use(name: str, options: FormatOptions) -> None:
    read = _KEYS.get(name, ())
    for key, column in vars(options).items():
        if column is not None and key not in read:
            flags = ", ".join(_flag(other) for other in read) or "no column flag"
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
    if name in FORMATS:
        return b""
    converter(name, FormatOptions())
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return Path(file).read_bytes() if file else b""


@dataclass(frozen=True)
class _UserConverter:
    name: str
    function: Callable[[Row], Any]

    def __call__(self, row: Row) -> Conversation:
        try:
            result = self.function(row)
        except RowError:
            raise
        except Exception as error:
            raise RowError(
                "converter failed", f"{self.name}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(result, Conversation):
            checked = conversation_from_messages(result.messages, result.tools, None, self.name)
            return _with_mask(checked, result.trained, self.name)
        if isinstance(result, Mapping):
            return conversation_from_messages(result.get("messages"), result.get("tools"))
        return conversation_from_messages(result, None, None, self.name)


def _with_mask(conversation: Conversation, trained: Any, name: str) -> Conversation:
    """The conversation with a converter's ``trained``; ``loss`` and ``weight`` fields still count.

    Raises:
        RowError: not one truth value a message, or one that trains another role.
    """
    messages = conversation.messages
    if not isinstance(trained, Sequence) or len(trained) != len(messages):
        found = len(trained) if isinstance(trained, Sequence) else type(trained).__name__
        raise RowError(
            "bad mask", f"{name}: 'trained' is {found}, expected {len(messages)}, one a message"
        )
    for number, (message, train) in enumerate(zip(messages, trained, strict=True), 1):
        if not isinstance(train, (bool, int)):
            raise RowError("bad mask", f"{name}: 'trained' of message {number} is {train!r}")
        if train and message["role"] != "assistant":
            raise RowError(
                "bad mask",
                f"{name}: message {number} is of role {message['role']}, only assistant messages "
                "can be trained",
            )
    both = [bool(a and b) for a, b in zip(trained, conversation.trained, strict=True)]
    return Conversation(messages, conversation.tools, both)


def _pair(
    row: Row,
    options: FormatOptions,
    prompt: str,
    query: str | None,
    response: str,
    history: list[dict[str, Any]],
) -> Conversation:
    question = _text(row, prompt, "--prompt-key", missing_is_empty=False)
    answer = _text(row, response, "--response-key", missing_is_empty=False)
    if isinstance(question, list) and isinstance(answer, list):
        return conversation_from_messages([*question, *answer], row.get("tools"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError("bad content", f"{prompt!r} and {response!r} are not both text")
    if query is not None:
        more = _text(row, query, "--query-key", missing_is_empty=options.query_key is None)
        if not isinstance(more, str):
            raise RowError("bad content", f"column {query!r} is not text")
        question = "\n".join(part for part in (question, more) if part)
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tools, system = row.get("tools"), _system(row, options)
    if not history and not tools and not system:
        return Conversation(pair, None, [False, True])
    return conversation_from_messages([*history, *pair], tools, system, "row")


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
    found = next((name for name in columns if row.get(name) is not None), None)
    if found is None:
        raise RowError("missing column", f"none of {', '.join(columns)} in columns {_columns(row)}")
    return found


def _missing(row: Row, column: str, flag: str) -> RowError:
    return RowError("missing column", f"no column {column!r} ({flag}); the row has {_columns(row)}")


def _columns(row: Row) -> str:
    return ", ".join(str(name) for name in list(row)[:20]) or "none"
