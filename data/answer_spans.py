r"""Which characters of a rendered conversation the assistant wrote, its stop tokens included.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nHm\n</think>\n\nYes<|im_end|>\n
                                                         [------------ turn ------------------]
                 gap before the answer: header ──────────┘                   stop ──┘

A turn begins where the *header* ends, the text that inference puts there itself (learned once from
the template's own generation prompt), and ends with the *stop*, the special token that the template
writes after an answer (learned once by comparing a last with an earlier turn). Where the answer
lies between them is known in one of two ways:

- ``{% generation %}`` blocks in the template enclose it;
- otherwise the conversation is rendered a second time with marks around everything anybody said.
  Taking the marks out must give the first rendering back, character by character, and every mark
  must have survived in order; then the marks' places are exact. If not, the row is refused.

Both ways give the same turns. An empty think block that the template adds by itself is part of the
header; white space and end-of-text tokens that it writes after the stop are not trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.chat_template import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    BLOCK_CLOSE,
    BLOCK_OPEN,
    OTHER_CLOSE,
    OTHER_OPEN,
    ChatTemplate,
    Message,
    Span,
    has_marks,
    split_marks,
)
from data.conversation import Conversation, Piece, mark_conversation
from data.errors import RowError

Method = Literal["generation", "marks"]

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_PROBE_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call12345",
            "function": {"name": "look", "arguments": {"a": "b"}},
        }
    ],
}


@dataclass(frozen=True)
class Turn:
    """One assistant message in the rendered text.

    Attributes:
        message: Index of the message (the last one, where the template joins several).
        start: First character that the assistant writes.
        end: One past its last character, the stop included.
        reasoning_end: One past the reasoning and its closing tag, or None without reasoning.
        stopped: Whether the turn ends with a stop that the template wrote.
    """

    message: int
    start: int
    end: int
    reasoning_end: int | None = None
    stopped: bool = True


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation: the text, and the assistant's turns in it."""

    text: str
    turns: list[Turn]


class AnswerFinder:
    """Renders conversations with one template and finds the assistant's turns.

    Args:
        template: The compiled template.
        special_tokens: Texts of the tokenizer's special tokens; stops are among them.
        added_tokens: Texts of all its added tokens, looked at when no special token follows.
        method: ``generation`` or ``marks``; None for ``generation`` where the template has it.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Sequence[str],
        added_tokens: Sequence[str] = (),
        method: Method | None = None,
    ) -> None:
        self.template = template
        self.method: Method = method or ("generation" if template.has_generation else "marks")
        self._tiers = [_any_of(special_tokens), _any_of([*special_tokens, *added_tokens])]
        self._headers: dict[str | None, str | None] = {}
        self._stop_texts: list[str] = []
        self._stops: re.Pattern[str] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that the template ends an assistant turn with, the most usual first."""
        self._learn_stops()
        return list(self._stop_texts)

    def find(self, conversation: Conversation, method: Method | None = None) -> Rendering:
        """Render a conversation and find its assistant turns.

        Raises:
            RowError: the template refuses the messages, or the turns cannot be told exactly.
        """
        method = method or self.method
        marked_text = self.template.render(conversation.messages, conversation.tools)
        text, blocks = split_marks(marked_text, BLOCK_OPEN, BLOCK_CLOSE)
        if has_marks(text):
            raise RowError("reserved character", "the text holds one of U+FDD0 to U+FDD5")
        if method == "generation":
            return Rendering(text, self._turns_from_blocks(conversation, text, blocks))
        return Rendering(text, self._turns_from_marks(conversation, text))

    # -- the answer lies between marks ---------------------------------------------------------

    def _turns_from_marks(self, conversation: Conversation, text: str) -> list[Turn]:
        answers, others, pieces = self._marked(conversation, text)
        by_message: dict[int, list[tuple[Piece, Span]]] = {}
        for piece, span in zip(pieces, answers, strict=True):
            by_message.setdefault(piece.message, []).append((piece, span))
        turns: list[Turn] = []
        messages = sorted(by_message)
        for number, message in enumerate(messages):
            found = by_message[message]
            first, last = found[0][1], found[-1][1]
            closes = [end for _, end in others if end <= first[0]] + [0]
            if number:
                closes.append(by_message[messages[number - 1]][-1][1][1])
            before = max(closes)
            limit = min(
                [begin for begin, _ in others if begin >= last[1]]
                + [by_message[m][0][1][0] for m in messages[number + 1 : number + 2]]
                + [len(text)]
            )
            role = conversation.messages[message - 1]["role"] if message else None
            start = before + len(self._header_in(text[before : first[0]], role))
            start = _skip_empty_think(text, start, first[0])
            end, stopped = self._end_of_turn(text, last[1], limit)
            reasoning_end = _end_of_reasoning(text, found)
            turns.append(Turn(message, start, end, reasoning_end, stopped))
        return turns

    def _marked(
        self, conversation: Conversation, text: str
    ) -> tuple[list[Span], list[Span], list[Piece]]:
        """Spans of the assistant's pieces and of everybody else's text in ``text``."""
        problem = RowError("marks lost", "the template was not rendered")
        for mark_others in (True, False):
            messages, pieces = mark_conversation(conversation.messages, mark_others)
            try:
                rendered = self.template.render(messages, conversation.tools)
                rendered, _ = split_marks(rendered, BLOCK_OPEN, BLOCK_CLOSE)
                answers, others = split_two_kinds(rendered)
            except RowError as error:
                problem = error
                continue
            plain = "".join(c for c in re.split(f"[{ANSWER_OPEN}-{OTHER_CLOSE}]", rendered))
            if plain != text:
                problem = RowError("marks change the text", _first_difference(plain, text))
                continue
            matched = _match(pieces, [text[a:b] for a, b in answers])
            return answers, others, matched
        raise problem

    # -- the answer lies in a generation block ---------------------------------------------------

    def _turns_from_blocks(
        self, conversation: Conversation, text: str, blocks: list[Span]
    ) -> list[Turn]:
        roles = [message["role"] for message in conversation.messages]
        assistants = [index for index, role in enumerate(roles) if role == "assistant"]
        stops = self._stop_pattern()
        turns: list[Turn] = []
        previous_end = 0
        for begin, end in blocks:
            limit = end
            block = text[begin:end]
            # A block of nothing but special tokens after a finished turn is no answer.
            if not self._tiers[1].sub("", block).strip() and turns and turns[-1].stopped:
                if not text[previous_end:begin].strip():
                    continue
            previous_end = end
            number = len(turns)
            message = assistants[number] if number < len(assistants) else -1
            role = roles[message - 1] if message > 0 else None
            header = self._header(role)
            start = begin + _overlap(header, text, begin, end)
            start = _skip_empty_think(text, start, end)
            found = list(stops.finditer(text, start, end)) if stops else []
            stopped = bool(found) and not text[found[-1].end() : end].strip()
            if stopped:
                end = found[-1].end()
            elif stops:
                # The author marked the content alone: what stops the turn follows the block.
                space = len(text) - len(text[limit:].lstrip())
                after = stops.match(text, limit) or stops.match(text, space)
                if after:
                    end, stopped = after.end(), True
            reasoning_end = None
            closing = text.find("</think>", start, end)
            if closing >= 0:
                reasoning_end = closing + len("</think>")
                reasoning_end += len(text[reasoning_end:end]) - len(
                    text[reasoning_end:end].lstrip()
                )
            turns.append(Turn(message, start, end, reasoning_end, stopped))
        if len(turns) != len(assistants):
            if not turns:
                raise RowError("no generation block", "the template marked nothing in this row")
            # The template joins or splits turns: the messages are told apart by marks instead.
            return self._turns_by_message(conversation, text, turns)
        return turns

    def _turns_by_message(
        self, conversation: Conversation, text: str, turns: list[Turn]
    ) -> list[Turn]:
        answers, _, pieces = self._marked(conversation, text)
        named: list[Turn] = []
        for turn in turns:
            inside = [
                piece.message
                for piece, (begin, end) in zip(pieces, answers, strict=True)
                if turn.start <= begin and end <= turn.end
            ]
            if not inside:
                raise RowError("no answer in a block", "a generation block holds no assistant text")
            named.append(replace(turn, message=inside[-1]))
        return named

    # -- headers and stops, learned from the template --------------------------------------------

    def _header_in(self, gap: str, role: str | None) -> str:
        """The header at the end of ``gap``, the text between the last speaker and the answer."""
        header = self._header(role)
        if header is not None and gap.startswith(header):
            return header
        # After other speakers the same header may follow a different ending.
        for known in {h for h in (self._header("user"), header) if h}:
            core = self._core(known)
            if core and core in gap:
                return gap[: gap.rindex(core) + len(core)]
        raise RowError(
            "header not found",
            f"after role {role!r} the template writes {gap[-60:]!r} before the answer, "
            f"expected {header!r}",
        )

    def _core(self, header: str) -> str:
        # From the last line or special token on: what names the assistant.
        found = [match.start() for match in self._tiers[1].finditer(header)]
        return header[found[-1] :] if found else ""

    def _header(self, role: str | None) -> str | None:
        if role not in self._headers:
            try:
                self._headers[role] = self._learn_header(role)
            except RowError:
                self._headers[role] = None
        return self._headers[role]

    def _learn_header(self, role: str | None) -> str:
        tail = {"role": role or "user", "content": "q q"}
        history: list[Message] = [{"role": "user", "content": "q q"}]
        if role == "tool":
            history += [_PROBE_CALL, {**tail, "name": "look", "tool_call_id": "call12345"}]
        elif role == "assistant":
            history += [tail]
        elif role == "system":
            history = [tail]
        answered = [*history, {"role": "assistant", "content": "a a"}]
        marked, _ = mark_conversation(history)
        prompt, _ = split_marks(
            self.template.render(marked, add_generation_prompt=True), BLOCK_OPEN, BLOCK_CLOSE
        )
        marked, _ = mark_conversation(answered)
        whole, _ = split_marks(self.template.render(marked), BLOCK_OPEN, BLOCK_CLOSE)
        closing = ANSWER_CLOSE if role == "assistant" else OTHER_CLOSE
        offered = prompt[prompt.rindex(closing) + 1 :] if closing in prompt else prompt
        opening = whole.rindex(ANSWER_OPEN)
        gap = whole[whole.rindex(closing, 0, opening) + 1 : opening]
        if gap.startswith(offered):
            header = offered
        else:
            header = _common_prefix(gap, offered)
        rest = gap[len(header) :]
        if rest.strip() and "add_generation_prompt" not in self.template.source:
            # No generation prompt to learn from: all that precedes the answer is header.
            header = gap
        return header

    def _end_of_turn(self, text: str, begin: int, limit: int) -> tuple[int, bool]:
        stops = self._stop_pattern()
        found = stops.search(text, begin, limit) if stops else None
        if found:
            return found.end(), True
        return begin, False

    def _stop_pattern(self) -> re.Pattern[str] | None:
        self._learn_stops()
        return self._stops

    def _learn_stops(self) -> None:
        if self._stop_texts:
            return
        ask: Message = {"role": "user", "content": "q q"}
        answer: Message = {"role": "assistant", "content": "a a"}
        result: Message = {
            "role": "tool",
            "content": "r r",
            "name": "look",
            "tool_call_id": "call12345",
        }
        last = self._tail([ask, answer], 0)
        mid = self._tail([ask, answer, ask, answer], 0)
        tails = [tail for tail in (last, mid) if tail is not None]
        for tail in (
            self._tail([ask, _PROBE_CALL, result, answer], 0),
            self._tail([ask, _PROBE_CALL], 0),
        ):
            if tail is not None:
                tails.append(tail)
        shared = _common_prefix(last or "", mid or "")
        for tier in self._tiers:
            run = tier.search(shared)
            if run:
                self._add_stop(_run_of(tier, shared, run.start()))
            for tail in tails:
                # A stop that is already known may stand behind the closing tags of a tool call.
                if not any(stop in tail for stop in self._stop_texts):
                    found = tier.search(tail)
                    if found:
                        self._add_stop(found.group())
            if self._stop_texts:
                break
        if not self._stop_texts and shared.strip():
            self._add_stop(shared.rstrip())
        if self._stop_texts:
            self._stops = _any_of(self._stop_texts)

    def _add_stop(self, stop: str) -> None:
        if stop not in self._stop_texts:
            self._stop_texts.append(stop)

    def _tail(self, messages: list[Message], answer: int) -> str | None:
        """What the template writes between answer number ``answer`` and the next speaker's text."""
        marked, pieces = mark_conversation(messages)
        first = pieces[0].message
        try:
            text, _ = split_marks(self.template.render(marked), BLOCK_OPEN, BLOCK_CLOSE)
        except RowError:
            return None
        count = sum(piece.message == first for piece in pieces)
        closes = [i for i, c in enumerate(text) if c == ANSWER_CLOSE]
        if len(closes) < count:
            return None
        rest = text[closes[count - 1] + 1 :]
        return re.split(f"[{ANSWER_OPEN}-{OTHER_CLOSE}]", rest, maxsplit=1)[0]


def split_two_kinds(marked: str) -> tuple[list[Span], list[Span]]:
    """Character spans of answer marks and of other marks, in the text without any of them.

    Raises:
        RowError: marks are lost, doubled or nested.
    """
    answers: list[Span] = []
    others: list[Span] = []
    opened: tuple[str, int] | None = None
    removed = 0
    for match in _MARK.finditer(marked):
        mark, at = match.group(), match.start() - removed
        removed += 1
        if mark in (ANSWER_OPEN, OTHER_OPEN):
            if opened:
                raise RowError("marks lost", "the template cuts or nests a message's text")
            opened = mark, at
        else:
            if not opened or (opened[0] == ANSWER_OPEN) != (mark == ANSWER_CLOSE):
                raise RowError("marks lost", "the template cuts or nests a message's text")
            (answers if mark == ANSWER_CLOSE else others).append((opened[1], at))
            opened = None
    if opened:
        raise RowError("marks lost", "the template cuts a message's text")
    return answers, others


_MARK = re.compile(f"[{ANSWER_OPEN}-{OTHER_CLOSE}]")


def _match(pieces: list[Piece], texts: list[str]) -> list[Piece]:
    """Pair the pieces that were marked with the texts that came out; nothing may be missing."""
    matched: list[Piece] = []
    rest = iter(pieces)
    dropped: list[Piece] = []
    for text in texts:
        for piece in rest:
            if piece.text is None or piece.text == text:
                matched.append(piece)
                break
            dropped.append(piece)
        else:
            raise RowError("marks lost", f"the template moves or repeats {text[:40]!r}")
    dropped += rest
    if any(piece.kind != "reasoning" for piece in dropped):
        lost = next(piece for piece in dropped if piece.kind != "reasoning")
        raise RowError(
            "answer dropped",
            f"the template leaves out {lost.kind} of message {lost.message + 1}: "
            f"{(lost.text or '')[:60]!r}",
        )
    if dropped:
        raise RowError(
            "reasoning dropped",
            f"the template leaves out the reasoning of message {dropped[0].message + 1}",
        )
    return matched


def _end_of_reasoning(text: str, found: list[tuple[Piece, Span]]) -> int | None:
    reasoning = [span for piece, span in found if piece.kind == "reasoning"]
    if not reasoning:
        return None
    rest = [span[0] for piece, span in found if piece.kind != "reasoning"]
    limit = min((begin for begin in rest if begin >= reasoning[-1][1]), default=len(text))
    closing = text.find("</think>", reasoning[-1][1], limit)
    if closing < 0:
        return limit if rest else reasoning[-1][1]
    end = closing + len("</think>")
    return end + len(text[end:limit]) - len(text[end:limit].lstrip())


def _skip_empty_think(text: str, start: int, limit: int) -> int:
    empty = _EMPTY_THINK.match(text, start, limit)
    return empty.end() if empty else start


def _overlap(header: str | None, text: str, begin: int, end: int) -> int:
    """How much of the header stands at the beginning of a generation block."""
    if not header:
        return 0
    for length in range(min(len(header), end - begin), 0, -1):
        inside = text[begin : begin + length]
        if header.endswith(inside):
            outside = header[: len(header) - length]
            if text.endswith(outside, 0, begin) or not outside:
                return length
    return 0


def _run_of(pattern: re.Pattern[str], text: str, begin: int) -> str:
    end = begin
    while found := pattern.match(text, end):
        end = found.end()
    return text[begin:end]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return first[:length]


def _first_difference(found: str, expected: str) -> str:
    at = len(_common_prefix(found, expected))
    return (
        f"at character {at} the template writes {found[at : at + 40]!r} for a marked and "
        f"{expected[at : at + 40]!r} for the plain conversation"
    )


def trained_spans(
    rendering: Rendering,
    conversation: Conversation,
    reasoning: Literal["keep", "last", "mask"] = "keep",
    loss_on: Literal["all", "last"] = "all",
) -> list[Span]:
    """The characters to train: turns that the row trains, with the reasoning policy applied."""
    spans: list[Span] = []
    for number, turn in enumerate(rendering.turns):
        is_last = number == len(rendering.turns) - 1
        if (loss_on == "last" and not is_last) or not conversation.trained[turn.message]:
            continue
        start = turn.start
        masked = reasoning == "mask" or (reasoning == "last" and not is_last)
        if masked and turn.reasoning_end is not None:
            start = turn.reasoning_end
        if start < turn.end:
            spans.append((start, turn.end))
    return spans
