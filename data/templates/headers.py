"""What a template writes around an assistant turn: headers before it, stops after it.

Both are learned from the template itself with tiny conversations, never from a list of models. The
*header* is what inference puts before the answer: the template's own generation prompt, cut at a
token's edge where an answered conversation departs from it. Stops: ``data.templates.stops``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from os.path import commonprefix

from data.errors import RowError
from data.rows.conversation import Message
from data.templates.marks import ANSWER_CLOSE, ANSWER_OPEN, OTHER_CLOSE
from data.templates.probe_messages import ANSWER, ASK, CALL, CALL_ID, RESULT, render_probe
from data.templates.reasoning import LEADING_CLOSE, LEADING_EMPTY_BLOCK, OPENED_BLOCK
from data.templates.stops import learn_stops
from data.templates.template import ChatTemplate

_THINK_TAGS = {"<think>", "</think>"}
_THINK_TAG = re.compile(r"</?think>")
# Tokens that part reasoning from answers, whatever a family calls them.
_CHANNEL = re.compile(r"think|thought|channel|reason|response|final", re.IGNORECASE)
_ONLY_TAGS = re.compile(r"(?:\s|</?think>)*\Z")


class TurnMarkup:
    """Headers and stops of one template.

    Args:
        template: The compiled template.
        special_tokens: Texts of the tokenizer's special tokens; stops are among them.
        added_tokens: Texts of all its added tokens, looked at when no special token follows.
        forms: Brings messages into the form that the template wants.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Sequence[str],
        added_tokens: Sequence[str],
        forms: Callable[[Sequence[Message]], list[Message]],
    ) -> None:
        self._template = template
        self._forms = forms
        self.tokens = _any_of([*special_tokens, *added_tokens])
        channels = [token for token in {*special_tokens, *added_tokens} if _CHANNEL.search(token)]
        self._channel = _any_of(channels)
        self._longest = max(map(len, [*special_tokens, *added_tokens]), default=0)
        # Any two characters that stand side by side in a token: nearly no turn begins between such.
        self._pairs = {
            a + b for token in (*special_tokens, *added_tokens) for a, b in pairwise(token)
        }
        self._headers: dict[str | None, str | None] = {}
        self._openings: dict[str | None, str] = {}
        self.stops = learn_stops(template, forms, [_any_of(special_tokens), self.tokens])
        self.stop_pattern = _any_of(self.stops)
        self.stop_is_token = bool(self.stops) and all(
            self.tokens.search(stop) for stop in self.stops
        )

    def header(self, role: str | None) -> str | None:
        """What precedes an answer after a message of ``role``; None when it cannot be learned."""
        if role not in self._headers:
            try:
                self._headers[role] = self._learn_header(role)
            except RowError:
                self._headers[role] = None
        return self._headers[role]

    def header_in(self, gap: str, previous: Message | None) -> str:
        """The header at the end of ``gap``, the text between the last speaker and the answer.

        Args:
            gap: That text.
            previous: The message before the answer.

        Raises:
            RowError: the gap is not what the template writes in the self-test.
        """
        role = previous["role"] if previous else None
        header = self.header(role)
        if header is not None:
            if previous and previous.get("tool_call_id"):
                # A few templates write the call's id after its result.
                header = header.replace(CALL_ID, previous["tool_call_id"])
            # White space after what was said is the message's own, if the template keeps it.
            for begin in (_white_space_after(previous), ""):
                if gap.startswith(begin + header):
                    return begin + header
            if header.startswith(gap):
                return gap
        # After another ending the same words may name the assistant.
        for known in (header, self.header("user")):
            core = self._core(known)
            if core and core in gap:
                return gap[: gap.rindex(core) + len(core)]
        raise RowError(
            "header not found",
            f"after role {role!r} the template writes {gap[-60:]!r} before the answer, "
            f"expected {header!r}",
        )

    def skip_opening(self, previous: Message | None, text: str, start: int, limit: int) -> int:
        """Where the model begins to write: after what the generation prompt has behind the header.

        Args:
            previous: The message before the answer.
            text: The rendered conversation.
            start: Where the header ends.
            limit: Where the first thing that the assistant says begins, or its block ends.
        """
        empty = LEADING_EMPTY_BLOCK.match(text, start, limit)
        if empty:
            return empty.end()
        role = previous["role"] if previous else None
        self.header(role)
        opening = self._openings.get(role, self._openings.get("user", ""))
        if not opening:
            return start
        closed = LEADING_CLOSE.match(text, start, limit)
        if closed and not LEADING_CLOSE.search(opening):
            return closed.end()
        same = len(commonprefix([opening, text[start:limit]]))
        # White space behind the tag may differ, and is the model's own then.
        whole = same == len(opening) or opening[:same].rstrip() == opening.rstrip()
        return start + same if whole else start

    def check_start(self, text: str, start: int, said: int) -> None:
        """See that a turn begins with what the assistant writes, not with a rest of its header.

        Args:
            text: The rendered conversation.
            start: Where the turn begins.
            said: Where the first thing that the assistant says in it does.

        Raises:
            RowError: the turn begins inside a token, or a message is ended or opened before ``said``.
        """
        window = (max(0, start - self._longest), start + self._longest)
        if text[max(0, start - 1) : start + 1] in self._pairs and any(
            m.start() < start < m.end() for m in self.tokens.finditer(text, *window)
        ):
            around = text[max(0, start - 30) : start + 30]
            raise RowError("header in answer", f"the turn would begin inside a token of {around!r}")
        before = text[start:said]
        found = sorted(token for token in self._foreign if token in before)
        if found:
            raise RowError("header in answer", f"{before[-90:]!r} before the answer holds {found}")

    @cached_property
    def _foreign(self) -> set[str]:
        """Tokens that end messages, or open answers."""
        return {*self.tokens.findall(self.header("user") or ""), *self.stops} - _THINK_TAGS

    def _core(self, header: str | None) -> str:
        found = [match.start() for match in self.tokens.finditer(header or "")]
        return (header or "")[found[-1] :] if found else ""

    def _learn_header(self, role: str | None) -> str:
        history: list[Message] = [ASK]
        if role == "tool":
            history += [CALL, RESULT]
        elif role == "assistant":
            history += [ANSWER]
        elif role == "system":
            history = [{"role": "system", "content": "s s"}]
        elif role is None:
            history = []
        prompt = render_probe(self._template, self._forms(history), True) if history else ""
        whole = render_probe(self._template, self._forms([*history, ANSWER]))
        closing = ANSWER_CLOSE if role == "assistant" else OTHER_CLOSE
        opening = whole.rfind(ANSWER_OPEN)
        begin = whole.rfind(closing, 0, max(opening, 0)) + 1
        if opening < 0 or (history and not begin):
            raise RowError("header not found", "the template drops the self-test's messages")
        gap = whole[begin:opening]
        if role is None:
            known = self.header("user") or ""
            core = self._core(known)
            if core and core in gap:
                return gap[: gap.rindex(core) + len(core)]
            return gap
        offered = prompt[prompt.rfind(closing) + 1 :]
        header = self._common_header(gap, offered)
        if gap[len(header) :].strip() and "add_generation_prompt" not in self._template.source:
            # No generation prompt to learn from: all that precedes the answer is header.
            header = gap
        # A think tag that the template opens by itself varies from turn to turn.
        header = OPENED_BLOCK.sub("", header)
        if offered.startswith(header):
            self._openings[role] = offered[len(header) :]
        return header

    def _common_header(self, gap: str, offered: str) -> str:
        """How much of the text before an answer the generation prompt offers.

        Raises:
            RowError: they differ in what opens the assistant's turn.
        """
        length = len(commonprefix([gap, offered]))
        for text in (gap, offered):
            for token in (*self.tokens.finditer(text), *_THINK_TAG.finditer(text)):
                if token.start() < length < token.end():
                    length = token.start()
        header = gap[:length]
        if not (gap[length:].strip() and offered[length:].strip()):
            return header
        if all(_ONLY_TAGS.match(self._channel.sub("", text[length:])) for text in (gap, offered)):
            return header  # a prompt that opens reasoning, before an answer that has none
        # They differ before the assistant's name, but end with the same tokens.
        same = len(commonprefix([gap[::-1], offered[::-1]]))
        if self.tokens.search(gap, len(gap) - same):
            return gap
        raise RowError(
            "header not found",
            f"before an answer stands {gap[-60:]!r}, but the generation prompt is {offered[-60:]!r}",
        )


def _white_space_after(message: Message | None) -> str:
    content = message["content"] if message else ""
    if isinstance(content, list) and content:
        content = content[-1].get("text")
    return content[len(content.rstrip()) :] if isinstance(content, str) else ""


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
