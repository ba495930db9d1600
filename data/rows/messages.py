"""Normalising lists of messages, whatever wrote them, to one shape.

{"role": "system" | "user" | "assistant" | "tool", "content": str,      (a user's: parts, with pictures)
 "reasoning_content": str, "tool_calls": [{"type", "id", "function": {"name", "arguments"}}],
 "name": str, "tool_call_id": str}                        (absent where there is no value)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import RowError
from data.rows.columns import Columns
from data.rows.conversation import REASONING_FIELDS, Conversation, Message
from data.rows.pictures import IMAGE_PARTS, picture_of, place
from data.rows.tool_calls import from_json, kind_of, tool_calls

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
# What a message is made of where nothing is to be told about it.
_PLAIN_KEYS = ({"role", "content"}, {"from", "value"})
_TRAIN_KEYS = ("loss", "weight", "train", "training")
# The last answer goes on: Mistral and DeepSeek, Qwen and Kimi.
_OPEN_KEYS = ("prefix", "partial")


def conversation_from_messages(
    raw: Any,
    tools: Any = None,
    system: Any = None,
    column: str = "messages",
    pictures: tuple[Sequence[Any] | None, str] = (None, "a column"),
) -> Conversation:
    """Normalise a list of OpenAI or ShareGPT messages.

    Args:
        raw: The list, or its JSON text.
        tools: Tool schemas: a list, its JSON text, or nothing.
        system: A system prompt that stands beside the list (and may be its first message too), or
            nothing.
        column: Where the list came from, for messages.
        pictures: Those beside the list, and the name of their column.

    Raises:
        RowError: something is of a wrong type, a role is unknown, or no assistant speaks.
    """
    if isinstance(raw, str):
        raw = from_json(raw, "bad messages", f"column {column!r}")
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RowError("bad messages", f"{column!r} is {kind_of(raw)}, expected a list of messages")
    messages: list[Message] = []
    trained: list[bool] = []
    unread: dict[str, None] = {}
    found_pictures: list[Any] = []
    open_end = False
    for number, item in enumerate(raw, 1):
        if isinstance(item, Mapping) and item.keys() not in _PLAIN_KEYS:
            item = Columns(item)
        message, train = _message(item, number, unread, found_pictures)
        messages.append(message)
        trained.append(train and message["role"] == "assistant")
        if isinstance(item, Columns):
            open_end = _is_open(item, message, number, len(raw))
            unread |= dict.fromkeys(f"message.{name}" for name in item.unread())
    if system is not None and system != "":
        if not isinstance(system, str):
            raise RowError("bad system", f"the system prompt is {kind_of(system)}, expected text")
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
            trained.insert(0, False)
        elif messages[0]["content"].strip() != system.strip():
            raise RowError(
                "two system prompts",
                f"{messages[0]['content'][:60]!r} in {column!r} and {system[:60]!r} beside it",
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn", "nothing in this conversation can be trained")
    found = normalise_tools(tools)
    return Conversation(
        messages,
        found,
        trained,
        open_end=open_end,
        unread=tuple(unread),
        pictures=place(found_pictures, *pictures),
    )


def normalise_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool schemas as a list of ``{"type": "function", "function": {...}}``, or None.

    Raises:
        RowError: not a list of objects, or one without a name.
    """
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, str):
        tools = from_json(tools, "bad tools", "'tools'")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RowError("bad tools", f"'tools' is {kind_of(tools)}, expected a list of schemas")
    schemas = []
    for number, tool in enumerate(tools, 1):
        if isinstance(tool, str):
            tool = from_json(tool, "bad tools", f"tool {number}")
        if not isinstance(tool, Mapping):
            raise RowError("bad tools", f"tool {number} is {kind_of(tool)}, expected an object")
        schema = dict(tool)
        schema = schema if "function" in schema else {"type": "function", "function": schema}
        function = schema["function"]
        if not (isinstance(function, Mapping) and function.get("name")):
            raise RowError("bad tools", f"tool {number} has no function name")
        schemas.append(schema)
    return schemas or None


def _message(
    item: Any, number: int, unread: dict[str, None], pictures: list[Any]
) -> tuple[Message, bool]:
    if not isinstance(item, Mapping):
        raise RowError("bad messages", f"message {number} is {kind_of(item)}, expected an object")
    role = role_of(item)
    if role is None:
        given = item.get("role") if item.get("role") is not None else item.get("from")
        raise RowError(
            "unknown role",
            f"message {number} has role {given!r}; known are {', '.join(sorted(_ROLE_NAMES))}",
        )
    message: Message = {"role": role}
    content = content_of(item)
    if _role_name(item) in ("function_call", "tool_call"):
        message["content"] = ""
        message["tool_calls"] = _calls(content, number, unread)
    else:
        _set_content(message, content, number, unread, pictures)
    for key in ("name", "tool_call_id"):
        if isinstance(item.get(key), str):
            message[key] = item[key]
    if message["role"] == "assistant":
        _set_assistant(message, item, number, unread)
    # Trained, it would teach to stop at once; asked, it would teach an answer to nothing.
    if content is None and not message.get("tool_calls") and not message.get("reasoning_content"):
        keys = ", ".join(f"{key} (null)" if item[key] is None else str(key) for key in item)
        raise RowError(
            "no content",
            f"message {number} has no text in 'content' or 'value', no tool calls and no "
            f"reasoning; its keys are {keys}",
        )
    return message, _train_flag(item, number)


def role_of(item: Any) -> str | None:
    """The role of a message as it stands in the data, one of ROLES; None if it is not known."""
    return _ROLE_NAMES.get(_role_name(item))


def content_of(item: Mapping[str, Any]) -> Any:
    """What a message says: ``content``, or ``value`` where that is absent; None without either.

    ShareGPT messages (``from``) say it in ``value`` first.
    """
    keys = ("content", "value") if item.get("role") is not None else ("value", "content")
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _role_name(item: Any) -> str:
    if not isinstance(item, Mapping):
        return ""
    given = item.get("role") if item.get("role") is not None else item.get("from")
    return given.strip().lower() if isinstance(given, str) else ""


def _calls(value: Any, number: int, unread: dict[str, None]) -> list[dict[str, Any]]:
    calls, left = tool_calls(value, number)
    unread |= dict.fromkeys(left)
    return calls


def _set_content(
    message: Message, content: Any, number: int, unread: dict[str, None], pictures: list[Any]
) -> None:
    if content is None:
        message["content"] = ""
    elif isinstance(content, str):
        message["content"] = content
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        texts, reasoning = [], []
        parts: list[dict[str, str]] = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
                parts.append({"type": "text", "text": part})
                continue
            if not isinstance(part, Mapping):
                raise RowError(
                    "bad content", f"message {number} has a part that is {kind_of(part)}"
                )
            part = Columns(part)
            kind = part.get("type", "text")
            if kind in IMAGE_PARTS:
                pictures.append(picture_of(part))
                parts.append({"type": "image"})
                unread |= dict.fromkeys(f"part.{name}" for name in part.unread())
                continue
            text = next((part[k] for k in (kind, "text", "value") if isinstance(k, str)
                         and isinstance(part.get(k), str)), None)  # fmt: skip
            if kind == "tool_call" and part.get("value") is not None:
                calls = _calls(part["value"], number, unread)
                message["tool_calls"] = [*message.get("tool_calls", []), *calls]
            elif kind in _TEXT_PARTS and text is not None:
                texts.append(text)
                parts.append({"type": "text", "text": text})
            elif kind in _REASONING_PARTS and text is not None:
                reasoning.append(text)
            else:
                raise RowError(
                    "bad content",
                    f"message {number} has a part of type {kind!r}; only text and pictures are read",
                )
            unread |= dict.fromkeys(f"part.{name}" for name in part.unread())
        message["content"] = "".join(texts)
        if len(parts) > len(texts):
            if message["role"] != "user":
                raise RowError(
                    "bad content",
                    f"message {number} ({message['role']}) has a picture; only a user's may",
                )
            message["content"] = parts
        if reasoning:
            message["reasoning_content"] = "\n".join(reasoning)
    else:
        raise RowError("bad content", f"content of message {number} is {kind_of(content)}")


def _set_assistant(
    message: Message, item: Mapping[str, Any], number: int, unread: dict[str, None]
) -> None:
    for field in (*REASONING_FIELDS, "reasoning_details"):
        value = item.get(field)
        if field == "reasoning_details":
            value = _detailed_reasoning(value, number)
            if value is None and isinstance(item, Columns):
                item.asked.discard(field)  # nothing that can be read, such as encrypted reasoning
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RowError("bad reasoning", f"{field} of message {number} is {kind_of(value)}")
        if message.get("reasoning_content", value) != value:
            raise RowError(
                "bad reasoning", f"message {number} has other reasoning in {field!r} and in a part"
            )
        message["reasoning_content"] = value
        if isinstance(item, Columns):
            item.asked.add("reasoning_details")  # of the same, told in detail
        break
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:
        calls = [item["function_call"]]
    if isinstance(calls, str) and calls:
        calls = from_json(calls, "bad tool call", f"the call in message {number}")
    if calls:
        message["tool_calls"] = _calls(calls, number, unread)


def _detailed_reasoning(details: Any, number: int) -> str | None:
    """The text of OpenRouter's ``reasoning_details``: its texts, or else its summaries."""
    if details is None or details == "":
        return None
    if isinstance(details, Mapping):
        details = [details]
    if isinstance(details, str) or not isinstance(details, Sequence):
        raise RowError(
            "bad reasoning", f"reasoning_details of message {number} is {kind_of(details)}"
        )
    for key in ("text", "summary"):
        said = [part.get(key) for part in details if isinstance(part, Mapping)]
        texts = [text for text in said if isinstance(text, str) and text]
        if texts:
            return "".join(texts)
    return None


def _is_open(item: Columns, message: Message, number: int, count: int) -> bool:
    """Whether a message is an answer that goes on after its end; only the last one can be."""
    given = [key for key in _OPEN_KEYS if item.get(key)]
    if not given:
        return False
    if item[given[0]] is not True and item[given[0]] != 1:
        raise RowError("bad prefix", f"{given[0]} of message {number} is {item[given[0]]!r}")
    if message["role"] != "assistant" or number != count or message.get("tool_calls"):
        raise RowError(
            "bad prefix",
            f"message {number} has {given[0]!r}, which only a last answer in text can be",
        )
    return True


def _train_flag(item: Mapping[str, Any], number: int) -> bool:
    """The per-message fields of _TRAIN_KEYS: False where one says so."""
    train = True
    for key in _TRAIN_KEYS:
        value = item.get(key)
        if value is None:
            continue
        if value not in (True, False) or not isinstance(value, (bool, int, float)):
            raise RowError(
                "bad loss field", f"{key} of message {number} is {value!r}, expected 0 or 1"
            )
        train = train and bool(value)
    return train
