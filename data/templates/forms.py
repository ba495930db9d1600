"""Small differences between templates in what messages must look like, found out by trying.

One conversation can be written down in several ways that mean the same: content as a string or as a
list of parts, tool arguments as an object or as JSON text, reasoning in a field or inside the
content. A template reads one of them and drops, or trips over, the others. Each choice is made once
for a template, by rendering a tiny conversation and looking whether everything said comes out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from data.errors import RowError
from data.rows.conversation import REASONING_FIELDS, Message, split_thinking
from data.templates.marks import ANSWER_OPEN, mark_conversation
from data.templates.probe_messages import ANSWER, ASK, CALL, RESULT
from data.templates.template import ChatTemplate
from data.templates.tool_call_ids import CallIds, with_call_ids

ReasoningForm = Literal["as is", "reasoning_content", "thinking", "reasoning", "inline"]
_OPENED = re.compile(r"<think>\s*\Z")
_NO_CONTENT: tuple[Any, ...] = ("", None)


class MessageForms:
    """The forms that one template wants.

    Args:
        template: The compiled template.

    Attributes:
        shows_tools: Whether the template tells the model which tools are on offer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.parts = False
        self.reasoning: ReasoningForm = "as is"
        self.arguments_as_text = False
        self.no_content: Any = ""
        self.call_ids: CallIds = "as is"
        plain = [ASK, ANSWER]
        if not self._survives(plain):
            if template.no_tools is None:
                template.no_tools = []
                if not self._survives(plain):
                    template.no_tools = None
            if template.no_tools is None:
                self.parts = True
                self.parts = self._survives(plain)
        self.reasoning = self._learn_reasoning()
        self._learn_tool_calls()
        self.shows_tools = self._learn_tools(plain)
        self._think_opening = self._learn_opening()

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in this template's forms; the same objects where nothing changes."""
        messages = with_call_ids(messages, self.call_ids)
        return [self._message(message) for message in messages]

    def open_thinking(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the think tag that the generation prompt opens put before raw completions.

        Where the prompt ends with an open tag, as DeepSeek-R1's does, a model's raw answer is
        ``reasoning</think>answer``; the prompt and it together are what was said.
        """
        if not self._think_opening:
            return list(messages)
        return [self._opened(message) for message in messages]

    def _opened(self, message: Message) -> Message:
        said = message["content"]
        if message["role"] != "assistant" or not isinstance(said, str) or "<think>" in said:
            return message
        if any(message.get(name) for name in REASONING_FIELDS):
            return message
        if said.count("</think>") != 1 or not said.partition("</think>")[0].strip():
            return message
        return {**message, "content": self._think_opening + said}

    def _message(self, message: Message) -> Message:
        if message["role"] == "assistant":
            if self.reasoning != "as is":
                message = _place_reasoning(message, self.reasoning)
            if message.get("tool_calls"):
                message = {**message, "tool_calls": [self._call(c) for c in message["tool_calls"]]}
                if not message["content"]:
                    message["content"] = self.no_content
        if self.parts and isinstance(message["content"], str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self.arguments_as_text and not isinstance(function["arguments"], str):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            return {**call, "function": {**function, "arguments": text}}
        return call

    def _survives(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether each thing that the assistant says comes out exactly once.

        A template may repeat the name of a called tool before its result.
        """
        return any(self._survives_with(messages, tools, names) for names in (True, False))

    def _survives_with(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, mark_names: bool
    ) -> bool:
        marked, pieces = mark_conversation(self.apply(messages), mark_names=mark_names)
        try:
            text = self.template.render(marked, tools)
        except RowError:
            return False
        if text.count(ANSWER_OPEN) != len(pieces):
            return False
        for piece in pieces:
            if piece.text is not None and f"{ANSWER_OPEN}{piece.text}" not in text:
                return False
        return True

    def _learn_reasoning(self) -> ReasoningForm:
        """Where reasoning has to be; ``as is`` when the template takes both usual places."""
        self.reasoning = "as is"
        field = [ASK, {**ANSWER, "reasoning_content": "r r"}]
        inline = [ASK, {"role": "assistant", "content": "<think>\nr r\n</think>\n\na a"}]
        if self._survives(field) and self._survives(inline):
            return "as is"
        forms: tuple[ReasoningForm, ...] = ("reasoning_content", "thinking", "reasoning", "inline")
        for form in forms:
            self.reasoning = form
            if self._survives(field):
                return form
        return "as is"

    def _learn_tool_calls(self) -> None:
        messages = [ASK, CALL, RESULT, ANSWER]
        for as_text in (False, True):
            for no_content in _NO_CONTENT:
                self.arguments_as_text, self.no_content = as_text, no_content
                if self._survives(messages):
                    self.call_ids = self._learn_call_ids(messages)
                    return
        self.arguments_as_text, self.no_content = False, ""

    def _learn_opening(self) -> str:
        """The think tag at the end of the generation prompt, or nothing."""
        try:
            prompt = self.template.render(self.apply([ASK]), add_generation_prompt=True)
        except RowError:
            return ""
        found = _OPENED.search(prompt)
        return found.group() if found else ""

    def _learn_tools(self, messages: list[Message]) -> bool:
        parameters = {"type": "object", "properties": {}, "required": []}
        function = {"name": "look_up_word", "description": "d d", "parameters": parameters}
        try:
            text = self.template.render(
                self.apply(messages), [{"type": "function", "function": function}]
            )
        except RowError:
            return True  # told when a row is refused
        return "look_up_word" in text

    def _learn_call_ids(self, messages: list[Message]) -> CallIds:
        """What ids of calls the template takes, told from a conversation that it renders."""
        without = self._survives([_with_id(message, None) for message in messages])
        if self._survives([_with_id(message, "call_0123456789abcdef") for message in messages]):
            return "as is" if without else "needed"
        return "nine"


def _with_id(message: Message, call_id: str | None) -> Message:
    """A message of the self-test with another id, or with none."""
    given = {} if call_id is None else {"id": call_id}
    if message.get("tool_calls"):
        calls = [{key: call[key] for key in ("type", "function")} for call in message["tool_calls"]]
        return {**message, "tool_calls": [{**call, **given} for call in calls]}
    if message["role"] == "tool":
        rest = {key: value for key, value in message.items() if key != "tool_call_id"}
        return rest if call_id is None else {**rest, "tool_call_id": call_id}
    return message


def _place_reasoning(message: Message, form: ReasoningForm) -> Message:
    """Move the reasoning of an assistant message to where the template reads it."""
    content = message["content"]
    reasoning = message.get("reasoning_content")
    if form == "inline":
        if not reasoning:
            return message
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        return {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{content or ''}"}
    opened = isinstance(content, str) and content.lstrip().startswith("<think>")
    if not reasoning and opened and "</think>" in content:
        reasoning, content = split_thinking(content)
    if not reasoning:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": content, form: reasoning}
