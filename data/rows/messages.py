"""Normalising lists of messages, whatever wrote them, to one shape.

{"role": "system" | "user" | "assistant" | "tool", "content": str,
 "reasoning_content": str, "tool_calls": [{"type", "id", "function": {"name", "arguments"}}],
 "name": str, "tool_call_id": str}                        (absent where there is no value)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import RowError
from data.rows.conversation import REASONING_FIELDS, Conversation, Message

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
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


def conversation_from_messages(
    raw: Any, tools: Any = None, system: Any = None, column: str = "messages"
) -> Conversation:
    """Normalise a list of OpenAI or ShareGPT messages.

    Args:
        raw: The list, or its JSON text.
        tools: Tool schemas: a list, its JSON text, or nothing.
        system: A system prompt that stands beside the list (and may be its first message too), or
            nothing.
        column: Where the list came from, for messages.

    Raises:
        RowError: something is of a wrong type, a role is unknown, or no assistant speaks.
    """
    if isinstance(raw, str):
        raw = _from_json(raw, "bad messages", f"column {column!r}")
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RowError("bad messages", f"{column!r} is {_kind(raw)}, expected a list of messages")
    messages: list[Message] = []
    trained: list[bool] = []
    for number, item in enumerate(raw, 1):
        message, train = _message(item, number)
        messages.append(message)
        trained.append(train and message["role"] == "assistant")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise RowError("bad system", f"the system prompt is {_kind(system)}, expected text")
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
    return Conversation(messages, normalise_tools(tools), trained)


def normalise_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool schemas as a list of ``{"type": "function", "function": {...}}``, or None.

    Raises:
        RowError: not a list of objects.
    """
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, str):
        tools = _from_json(tools, "bad tools", "'tools'")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RowError("bad tools", f"'tools' is {_kind(tools)}, expected a list of schemas")
    schemas = []
    for number, tool in enumerate(tools, 1):
        if isinstance(tool, str):
            tool = _from_json(tool, "bad tools", f"tool {number}")
        if not isinstance(tool, Mapping):
            raise RowError("bad tools", f"tool {number} is {_kind(tool)}, expected an object")
        schema = dict(tool)
        schemas.append(schema if "function" in schema else {"type": "function", "function": schema})
    return schemas or None


def _message(item: Any, number: int) -> tuple[Message, bool]:
    if not isinstance(item, Mapping):
        raise RowError("bad messages", f"message {number} is {_kind(item)}, expected an object")
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
        message["tool_calls"] = _tool_calls(content, number)
    else:
        _set_content(message, content, number)
    for key in ("name", "tool_call_id"):
        if isinstance(item.get(key), str):
            message[key] = item[key]
    if message["role"] == "assistant":
        _set_assistant(message, item, number)
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


def _set_content(message: Message, content: Any, number: int) -> None:
    if content is None:
        message["content"] = ""
    elif isinstance(content, str):
        message["content"] = content
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        texts, reasoning = [], []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
                continue
            if not isinstance(part, Mapping):
                raise RowError("bad content", f"message {number} has a part that is {_kind(part)}")
            kind = part.get("type", "text")
            text = next((part[k] for k in (kind, "text", "value") if isinstance(k, str)
                         and isinstance(part.get(k), str)), None)  # fmt: skip
            if kind == "tool_call" and part.get("value") is not None:
                calls = _tool_calls(part["value"], number)
                message["tool_calls"] = [*message.get("tool_calls", []), *calls]
            elif kind in _TEXT_PARTS and text is not None:
                texts.append(text)
            elif kind in _REASONING_PARTS and text is not None:
                reasoning.append(text)
            else:
                raise RowError(
                    "bad content",
                    f"message {number} has a part of type {kind!r}; only text is read",
                )
        message["content"] = "".join(texts)
        if reasoning:
            message["reasoning_content"] = "\n".join(reasoning)
    else:
        raise RowError("bad content", f"content of message {number} is {_kind(content)}")


def _set_assistant(message: Message, item: Mapping[str, Any], number: int) -> None:
    for field in REASONING_FIELDS:
        value = item.get(field)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RowError("bad reasoning", f"{field} of message {number} is {_kind(value)}")
        message["reasoning_content"] = value
        break
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:
        calls = [item["function_call"]]
    if isinstance(calls, str) and calls:
        calls = _from_json(calls, "bad tool call", f"the call in message {number}")
    if calls:
        message["tool_calls"] = _tool_calls(calls, number)


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Calls as ``{"type", "id", "function": {"name", "arguments": object}}``."""
    if isinstance(value, str):
        value = _from_json(value, "bad tool call", f"the call in message {number}")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError("bad tool call", f"the call in message {number} is {_kind(value)}")
    calls = []
    for call in value:
        if not isinstance(call, Mapping):
            raise RowError("bad tool call", f"a call in message {number} is {_kind(call)}")
        function = call.get("function") if isinstance(call.get("function"), Mapping) else call
        assert isinstance(function, Mapping)
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            raise RowError("bad tool call", f"a call in message {number} has no function name")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, "bad tool call", f"arguments in message {number}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise RowError("bad tool call", f"arguments in message {number} are {_kind(arguments)}")
        entry: dict[str, Any] = {"type": "function"}
        if isinstance(call.get("id"), str):
            entry["id"] = call["id"]
        calls.append({**entry, "function": {"name": name, "arguments": arguments}})
    if not calls:
        raise RowError("bad tool call", f"message {number} has an empty list of calls")
    return calls


def _train_flag(item: Mapping[str, Any], number: int) -> bool:
    """The per-message ``loss`` and ``weight`` fields: False where one says so."""
    train = True
    for key in ("loss", "weight"):
        value = item.get(key)
        if value is None:
            continue
        if value not in (True, False) or not isinstance(value, (bool, int, float)):
            raise RowError(
                "bad loss field", f"{key} of message {number} is {value!r}, expected 0 or 1"
            )
        train = train and bool(value)
    return train


def _from_json(text: str, reason: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(reason, f"{what} is not valid JSON ({str(error)[:80]})") from error


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
