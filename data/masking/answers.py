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

Both ways give the same turns. A think tag or an empty think block that the template adds by itself
is part of the header, and empty blocks that the data has are left out of what is trained; white
space and end-of-text tokens that the template writes after the stop are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from data.errors import RowError
from data.masking.generation_blocks import RenderedRow, trusted_turns, turns_from_blocks
from data.masking.marked_rendering import MarkedRendering, render_marked
from data.masking.refusals import (
    reason_once,
    refuse_escapes,
    refuse_stops_inside,
    refuse_stray_tags,
    require_questions,
    require_results,
    what_it_lacks,
)
from data.masking.turns import OPENED_THINK, Turn, end_of_reasoning, skip
from data.rows.conversation import Conversation, Message, begin_of_last_turn
from data.templates.forms import MessageForms
from data.templates.headers import TurnMarkup
from data.templates.marks import BLOCK_CLOSE, BLOCK_OPEN, Piece, Span, has_marks, split_marks
from data.templates.reasoning import without_empty_blocks
from data.templates.template import ChatTemplate

Method = Literal["generation", "marks"]
Reasoning = Literal["keep", "last", "mask"]
LossOn = Literal["all", "last"]


class Rendering(NamedTuple):
    """A rendered conversation: the text, and the assistant's turns in it."""

    text: str
    turns: list[Turn]


class AnswerFinder:
    """Renders conversations with one template and finds the assistant's turns.

    Args:
        template: The compiled template.
        special_tokens: Texts of the tokenizer's special tokens.
        added_tokens: Texts of all its added tokens.
        method: ``generation`` or ``marks``; None for ``generation`` where the template has it.
        trust_blocks: Take the blocks of a template as they are, whatever marks say.
        reasoning: Policy; under ``last`` and ``mask`` a template may drop that of earlier turns.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Sequence[str],
        added_tokens: Sequence[str] = (),
        method: Method | None = None,
        reasoning: Reasoning = "keep",
        trust_blocks: bool = False,
    ) -> None:
        self.template = template
        self.trust_blocks = trust_blocks
        self.method: Method = method or ("generation" if template.has_generation else "marks")
        self.reasoning: Reasoning = reasoning
        self.special_tokens, self.added_tokens = special_tokens, added_tokens
        self.forms = MessageForms(template)
        self.markup = TurnMarkup(template, special_tokens, added_tokens, self.forms.apply)

    def find(self, conversation: Conversation, method: Method | None = None) -> Rendering:
        """Render a conversation and find its assistant turns.

        Raises:
            RowError: the template refuses the messages, or the turns cannot be told exactly.
        """
        said = self.forms.open_thinking(reason_once(conversation.messages))
        if self.reasoning != "keep":
            refuse_stray_tags(said)
        messages = self.forms.apply(said)
        try:
            marked_text = self.template.render(messages, conversation.tools)
        except RowError as error:
            raise RowError(error.reason, error.detail + what_it_lacks(messages)) from error
        text, blocks = split_marks(marked_text, BLOCK_OPEN, BLOCK_CLOSE)
        if has_marks(text):
            raise RowError("reserved character", "the text holds one of U+FDD0 to U+FDD5")
        row = RenderedRow(conversation, messages, text)
        everything = [messages, conversation.tools, self.template.variables]
        refuse_escapes(everything, self.template.source, text)
        require_questions(conversation.messages, text)
        if (method or self.method) == "generation":
            if self.trust_blocks:
                turns = trusted_turns(row, blocks, self.markup)
            else:
                turns = turns_from_blocks(row, blocks, self.markup, self._marked)
        else:
            turns = self._turns_from_marks(row, self._marked(row))
        require_results(conversation.messages, text)
        refuse_stops_inside(conversation, text, turns, self.markup.stops)
        return Rendering(text, turns)

    # -- the answer lies between marks ---------------------------------------------------------

    def _turns_from_marks(self, row: RenderedRow, marked: MarkedRendering) -> list[Turn]:
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
                start = skip(OPENED_THINK, text, start, first)
            # What the prompt writes itself is not for the model to write.
            start = self.markup.skip_opening(previous, text, start, first)
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
            reasoning_end = end_of_reasoning(text, here, self.markup.tokens)
            turns.append(Turn(message, start, end, reasoning_end, bool(stop)))
        return turns

    def _marked(self, row: RenderedRow) -> MarkedRendering:
        return render_marked(
            self.template,
            row.messages,
            row.conversation.tools,
            row.text,
            self.may_drop_reasoning_before(row.messages),
        )

    def may_drop_reasoning_before(self, messages: Sequence[Message]) -> int:
        """The first message whose reasoning the template must write; ``keep`` alone trains all."""
        return 0 if self.reasoning == "keep" else begin_of_last_turn(messages)


def trained_spans(
    rendering: Rendering,
    conversation: Conversation,
    reasoning: Reasoning = "keep",
    loss_on: LossOn = "all",
) -> list[Span]:
    """The characters to train: turns that the row trains, with the reasoning policy applied."""
    spans: list[Span] = []
    last = (
        0 if (loss_on, reasoning) == ("all", "keep") else begin_of_last_turn(conversation.messages)
    )
    for turn in rendering.turns:
        is_last = turn.message >= last
        if (loss_on == "last" and not is_last) or not conversation.trained[turn.message]:
            continue
        start = turn.start
        masked = reasoning == "mask" or (reasoning == "last" and not is_last)
        if masked and turn.reasoning_end is not None:
            start = turn.reasoning_end
        # An empty answer without a stop has nothing to learn but the white space around it.
        if start < turn.end and (turn.stopped or rendering.text[start : turn.end].strip()):
            spans += without_empty_blocks(rendering.text, (start, turn.end))
    return spans


def edges_of_answers(rendering: Rendering, spans: Sequence[Span]) -> list[int]:
    """The edges of trained spans at which inference's prompt ends or an answer does, ascending.

    Others, where untrained reasoning ends, lie inside what the model writes.
    """
    inside = {turn.reasoning_end for turn in rendering.turns}
    edges: set[int] = set()
    for turn in rendering.turns:
        own = [span for span in spans if turn.start <= span[0] and span[1] <= turn.end]
        if own:
            edges |= {own[0][0], own[-1][1]} - inside
    return sorted(edges)
