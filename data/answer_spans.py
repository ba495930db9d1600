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
  must have survived in order; then the marks' places are exact. If not, the row is refused. (For
  further rows of the same shape ``data.outline`` gives the same proof from one rendering.)

Both ways give the same turns. A think tag or an empty think block that the template adds by itself
is part of the header, and empty blocks that the data has are left out of what is trained; white
space and end-of-text tokens that the template writes after the stop are not trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.chat_template import (
    BLOCK_CLOSE,
    BLOCK_OPEN,
    ChatTemplate,
    Message,
    Span,
    has_marks,
    split_marks,
)
from data.conversation import Conversation, Piece, begin_of_last_turn, mark_conversation
from data.errors import RowError
from data.marked_rendering import MarkedRendering, render_marked
from data.outline import Outline, Turn, is_plain, outline_key
from data.reasoning import without_empty_blocks
from data.template_forms import MessageForms
from data.turn_markup import TurnMarkup

Method = Literal["generation", "marks"]
Reasoning = Literal["keep", "last", "mask"]
LossOn = Literal["all", "last"]

# Templates end the block with at most two line breaks; more white space is the answer's own.
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\n{0,2}")
# A block that the template opens, as in its generation prompt, before an answer without reasoning.
_OPENED_THINK = re.compile(r"\s*<think>\n?(?!\s*</think>)")
_MAX_OUTLINES = 1024


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation: the text, and the assistant's turns in it."""

    text: str
    turns: list[Turn]


@dataclass(frozen=True)
class _Row:
    conversation: Conversation
    messages: list[Message]  # in the forms that the template wants
    text: str


class AnswerFinder:
    """Renders conversations with one template and finds the assistant's turns.

    Args:
        template: The compiled template.
        special_tokens: Texts of the tokenizer's special tokens.
        added_tokens: Texts of all its added tokens.
        method: ``generation`` or ``marks``; None for ``generation`` where the template has it.
        reasoning: Policy; under ``last`` a template may drop the reasoning of earlier turns.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Sequence[str],
        added_tokens: Sequence[str] = (),
        method: Method | None = None,
        reasoning: Reasoning = "keep",
    ) -> None:
        self.template = template
        self.method: Method = method or ("generation" if template.has_generation else "marks")
        self.reasoning: Reasoning = reasoning
        self.special_tokens, self.added_tokens = special_tokens, added_tokens
        self.forms = MessageForms(template)
        self._outlines: dict[tuple[str, ...], Outline] = {}
        self.markup = TurnMarkup(template, special_tokens, added_tokens, self.forms.apply)

    def find(self, conversation: Conversation, method: Method | None = None) -> Rendering:
        """Render a conversation and find its assistant turns.

        Raises:
            RowError: the template refuses the messages, or the turns cannot be told exactly.
        """
        said = self.forms.open_thinking(conversation.messages)
        if self.reasoning != "keep":
            _refuse_unopened(said)
        messages = self.forms.apply(said)
        try:
            marked_text = self.template.render(messages, conversation.tools)
        except RowError as error:
            raise RowError(error.reason, error.detail + _what_it_lacks(messages)) from error
        text, blocks = split_marks(marked_text, BLOCK_OPEN, BLOCK_CLOSE)
        if has_marks(text):
            raise RowError("reserved character", "the text holds one of U+FDD0 to U+FDD5")
        row = _Row(conversation, messages, text)
        if (method or self.method) == "generation":
            _require_questions(conversation.messages, text)
            return Rendering(text, self._turns_from_blocks(row, blocks))
        return Rendering(text, self._turns_from_marks(row))

    # -- the answer lies between marks ---------------------------------------------------------

    def _turns_from_marks(self, row: _Row) -> list[Turn]:
        outline = outline_key(row.messages, row.conversation.tools)
        known = self._outlines.get(outline) if outline else None
        turns = known.turns(row.messages, row.text) if known else None
        if turns is None:
            _require_questions(row.conversation.messages, row.text)
            marked = self._marked(row)
            turns = self._turns_of(row, marked)
            if outline and (known or len(self._outlines) < _MAX_OUTLINES):
                speech = sorted([*marked.others, *marked.spans])
                learned = Outline.learn(row.messages, row.text, speech, turns)
                if learned is not None:
                    self._outlines[outline] = learned
        return turns

    def _turns_of(self, row: _Row, marked: MarkedRendering) -> list[Turn]:
        text = row.text
        found: dict[int, list[tuple[Piece, Span]]] = {}
        for piece, span in zip(marked.pieces, marked.spans, strict=True):
            found.setdefault(piece.message, []).append((piece, span))
        speech = sorted([*marked.others, *marked.spans])
        turns: list[Turn] = []
        for message, here in found.items():
            first, last = here[0][1][0], here[-1][1][1]
            # Everybody's speech is in order, and a message's own pieces stand together.
            at = speech.index(here[0][1])
            before = speech[at - 1][1] if at else 0
            at += len(here)
            limit = speech[at][0] if at < len(speech) else len(text)
            previous = row.messages[message - 1] if message else None
            header = self.markup.header_in(text[before:first], previous)
            start = before + len(header)
            before_it = text[start:first]
            unclosed = before_it.count("<think>") > before_it.count("</think>")
            if unclosed and here[0][0].kind != "reasoning":
                start = _skip(_OPENED_THINK, text, start, first)
            start = _skip(_EMPTY_THINK, text, start, first)
            self.markup.check_start(text, start, first)
            stop = self.markup.stop_pattern.search(text, last, limit)
            if stop is None and here[-1][0].kind == "tool":
                # Where the call's closing markup ends cannot be told.
                where = text[last : min(limit, last + 60)]
                raise RowError(
                    "no stop",
                    f"after the tool call of message {message + 1} comes {where!r}; give a "
                    "template that ends the call with a stop token (--chat-template FILE)",
                )
            # Without a stop an answer ends where its last piece does.
            end = stop.end() if stop else last
            turns.append(Turn(message, start, end, _end_of_reasoning(text, here), bool(stop)))
        return turns

    def _marked(self, row: _Row) -> MarkedRendering:
        return render_marked(
            self.template, row.messages, row.conversation.tools, row.text, self.reasoning == "last"
        )

    # -- the answer lies in a generation block ---------------------------------------------------

    def _turns_from_blocks(self, row: _Row, blocks: list[Span]) -> list[Turn]:
        text, roles = row.text, [message["role"] for message in row.messages]
        assistants = [index for index, role in enumerate(roles) if role == "assistant"]
        turns: list[Turn] = []
        previous_end = 0
        for begin, end in blocks:
            # A block of nothing but special tokens right after a finished turn is no answer.
            empty = not self.markup.tokens.sub("", text[begin:end]).strip()
            follows = turns and turns[-1].stopped and not text[previous_end:begin].strip()
            previous_end = end
            if empty and follows:
                continue
            message = assistants[len(turns)] if len(turns) < len(assistants) else -1
            turns.append(self._turn_in_block(text, begin, end, message, roles))
        if not turns:
            raise RowError("no generation block", "the template marked nothing in this row")
        one_each = len(turns) == len(assistants)
        if one_each and all(is_plain(row.messages[turn.message]) for turn in turns):
            for turn in turns:
                said = row.messages[turn.message]["content"].strip()
                if said not in text[turn.start : turn.end]:
                    raise RowError(
                        "answer dropped", f"the template leaves out content {said[:60]!r}"
                    )
                self.markup.check_start(text, turn.start, text.index(said, turn.start))
            return turns
        return self._checked_by_marks(row, turns, one_each)

    def _turn_in_block(
        self, text: str, begin: int, end: int, message: int, roles: list[str]
    ) -> Turn:
        stops = self.markup.stop_pattern
        header = self.markup.header(roles[message - 1] if message > 0 else None)
        start = begin + _overlap(header, text, begin, end)
        start = _skip(_EMPTY_THINK, text, start, end)
        found = list(stops.finditer(text, start, end))
        stopped = (
            bool(found) and not self.markup.tokens.sub("", text[found[-1].end() : end]).strip()
        )
        if stopped:
            end = found[-1].end()
        else:
            # The author may have marked the content alone: then the stop follows the block.
            space = len(text) - len(text[end:].lstrip())
            after = stops.match(text, end) or stops.match(text, space)
            if after:
                end, stopped = after.end(), True
        reasoning_end = None
        closing = text.find("</think>", start, end)
        if closing >= 0:
            reasoning_end = _skip_space(text, closing + len("</think>"), end)
        return Turn(message, start, end, reasoning_end, stopped)

    def _checked_by_marks(self, row: _Row, turns: list[Turn], one_each: bool) -> list[Turn]:
        """See with marks that every piece lies in a block, and whose it is."""
        try:
            marked = self._marked(row)
        except RowError as error:
            if error.reason.endswith("dropped") or not one_each:
                raise
            # Marks change this text. The template's author knows better, if all of it is there.
            _, pieces = mark_conversation(row.messages)
            for turn in turns:
                inside_turn = row.text[turn.start : turn.end]
                for piece in pieces:
                    if piece.message == turn.message and (piece.text or "") not in inside_turn:
                        raise RowError(
                            "answer dropped", f"the template leaves out {piece.text!r}"
                        ) from error
                self.markup.check_start(row.text, turn.start, _first_said(row, turn, pieces))
            return turns
        named: list[Turn] = []
        unplaced = list(zip(marked.pieces, marked.spans, strict=True))
        for turn in turns:
            inside = [(p, s) for p, s in unplaced if turn.start <= s[0] and s[1] <= turn.end]
            unplaced = [pair for pair in unplaced if pair not in inside]
            if not inside:
                raise RowError("no answer in a block", "a generation block holds no assistant text")
            self.markup.check_start(row.text, turn.start, inside[0][1][0])
            reasoning_end = _end_of_reasoning(row.text, inside)
            message = inside[-1][0].message
            if named and (named[-1].message, named[-1].end) == (message, turn.start):
                # One message in two adjoining blocks, reasoning and answer.
                before = named.pop()
                turn = replace(turn, start=before.start)
                reasoning_end = before.reasoning_end or reasoning_end
            named.append(replace(turn, message=message, reasoning_end=reasoning_end))
        if unplaced:
            piece = unplaced[0][0]
            raise RowError(
                "answer outside a block",
                f"{piece.kind} of message {piece.message + 1} is not in a generation block: "
                f"{(piece.text or '')[:60]!r}",
            )
        return named


def trained_spans(
    rendering: Rendering,
    conversation: Conversation,
    reasoning: Reasoning = "keep",
    loss_on: LossOn = "all",
) -> list[Span]:
    """The characters to train: turns that the row trains, with the reasoning policy applied."""
    spans: list[Span] = []
    last = begin_of_last_turn(conversation.messages)
    for turn in rendering.turns:
        is_last = turn.message >= last
        if (loss_on == "last" and not is_last) or not conversation.trained[turn.message]:
            continue
        start = turn.start
        masked = reasoning == "mask" or (reasoning == "last" and not is_last)
        if masked and turn.reasoning_end is not None:
            start = turn.reasoning_end
        if start < turn.end:
            spans += without_empty_blocks(rendering.text, (start, turn.end))
    return spans


def _end_of_reasoning(text: str, found: list[tuple[Piece, Span]]) -> int | None:
    reasoning = [span for piece, span in found if piece.kind == "reasoning"]
    if not reasoning:
        return None
    after = reasoning[-1][1]
    rest = [span[0] for piece, span in found if piece.kind != "reasoning" and span[0] >= after]
    limit = min(rest, default=len(text))
    closing = text.find("</think>", after, limit)
    if closing >= 0:
        return _skip_space(text, closing + len("</think>"), limit)
    return limit if rest else after


def _refuse_unopened(messages: Sequence[Message]) -> None:
    """Text before a closing tag that nothing opened may be reasoning, or talk about the tag."""
    for number, message in enumerate(messages, 1):
        said = message["content"] if message["role"] == "assistant" else ""
        before, closing, _ = said.partition("</think>") if isinstance(said, str) else ("", "", "")
        if closing and before.strip() and not before.lstrip().startswith("<think>"):
            raise RowError(
                "stray think tag",
                f"message {number} has </think> without <think> at its beginning: whether "
                f"{before[-60:]!r} is reasoning cannot be told",
            )


def _what_it_lacks(messages: Sequence[Message]) -> str:
    """What of a row that a template refuses the template may not know, and what to do."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        found = "calls tools"
    elif any(message["role"] == "system" for message in messages):
        found = "has a system prompt"
    else:
        return ""
    return f" (the row {found}; --chat-template FILE gives a template that renders this)"


def _require_questions(messages: Sequence[Message], text: str) -> None:
    """See that what users and system prompts say comes out; results of tools may be rewritten.

    Raises:
        RowError: an answer would be trained without its question.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"]
        if message["role"] in ("user", "system") and isinstance(said, str):
            if said.strip() not in text:
                raise RowError(
                    "question dropped",
                    f"the template leaves out or changes what message {number} ({message['role']}) "
                    f"says: {said.strip()[:60]!r}; --chat-template FILE gives another",
                )


def _first_said(row: _Row, turn: Turn, pieces: Sequence[Piece]) -> int:
    own = [piece.text for piece in pieces if piece.message == turn.message and piece.text]
    return min((row.text.index(said, turn.start) for said in own), default=turn.start)


def _skip_space(text: str, begin: int, end: int) -> int:
    inside = text[begin:end]
    return begin + len(inside) - len(inside.lstrip())


def _skip(pattern: re.Pattern[str], text: str, start: int, limit: int) -> int:
    found = pattern.match(text, start, limit)
    return found.end() if found else start


def _overlap(header: str | None, text: str, begin: int, end: int) -> int:
    """How much of the header stands at the beginning of a generation block."""
    for length in range(min(len(header or ""), end - begin), 0, -1):
        assert header is not None
        outside = header[: len(header) - length]
        inside = text.startswith(header[-length:], begin, end)
        if inside and text.endswith(outside, 0, begin):
            return length
    return 0
