"""Rows to text: converted, rendered, and with the characters that are trained told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

from data.errors import RowError
from data.masking.answers import AnswerFinder, edges_of_answers, trained_spans
from data.rows.conversation import Conversation
from data.rows.registry import converter
from data.sources.chunks import RawRow
from data.templates.marks import Span
from data.templates.template import ChatTemplate
from data.tokenise.options import TokenizeOptions


@dataclass
class RowText:
    """One row as its template writes it.

    Attributes:
        raw: The row as it was read.
        conversation: The same as a conversation.
        text: The rendered text.
        spans: The character spans in it that are trained, ascending.
        edges: Those of their edges at which inference's prompt ends, or an answer does.
        turns: How many turns the assistant has.
        stopped: How many of them end with a stop.
    """

    raw: RawRow
    conversation: Conversation
    text: str
    spans: list[Span]
    edges: list[int]
    turns: int
    stopped: int


class RowRenderer:
    """Renders rows with one template.

    Args:
        options: Format, template and what of a row is trained.
    """

    def __init__(self, options: TokenizeOptions) -> None:
        self.reasoning, self.loss_on = options.reasoning, options.loss_on
        self.convert = converter(options.format, options.mapping)
        day = date.fromisoformat(options.day) if options.day else None
        template = ChatTemplate(options.template, options.special_tokens, options.variables, day)
        self.finder = AnswerFinder(
            template,
            options.special,
            list(options.added.values()),
            reasoning=options.reasoning,
            trust_blocks=options.trust_blocks,
        )

    def render(self, raw: RawRow) -> RowText:
        """Convert and render one row.

        Raises:
            RowError: the row cannot be used.
        """
        if raw.error is not None:
            raise raw.error
        if not isinstance(raw.row, Mapping):
            raise RowError("not an object", f"the row is {type(raw.row).__name__}, not an object")
        try:
            return self._rendered(raw, self.convert(raw.row))
        except RecursionError as error:
            raise RowError("nested too deeply", "the row's values are nested too deeply") from error

    def _rendered(self, raw: RawRow, conversation: Conversation) -> RowText:
        rendering = self.finder.find(conversation)
        if not rendering.text.isascii():
            try:
                rendering.text.encode()
            except UnicodeEncodeError as error:
                raise RowError("bad text", f"not valid Unicode ({error.reason})") from error
        spans = trained_spans(rendering, conversation, self.reasoning, self.loss_on)
        stopped = sum(turn.stopped for turn in rendering.turns)
        edges = edges_of_answers(rendering, spans)
        return RowText(
            raw, conversation, rendering.text, spans, edges, len(rendering.turns), stopped
        )

    def without_oldest_turns(self, row: RowText, fits: Callable[[RowText], bool]) -> RowText | None:
        """Leave out the oldest turns, question and answers together, until the rest fits.

        What is left is rendered like any conversation, so no header, answer or stop is ever cut.

        Args:
            row: The row.
            fits: Whether a row is short enough.

        Returns:
            The row with the fewest turns left out; None where not even the last turn fits.
        """
        messages = row.conversation.messages
        first = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
        starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
        low, high = 0, len(starts)
        best: RowText | None = None
        while low < high:  # the fewest turns that have to go
            middle = (low + high) // 2
            cut = starts[middle]
            shorter = Conversation(
                [*messages[:first], *messages[cut:]],
                row.conversation.tools,
                [*row.conversation.trained[:first], *row.conversation.trained[cut:]],
            )
            try:
                rendered = self._rendered(row.raw, shorter)
            except RowError:
                rendered = None
            if rendered is not None and fits(rendered):
                best, high = rendered, middle
            else:
                low = middle + 1
        return best
