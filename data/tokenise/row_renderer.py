"""Rows to text: converted, rendered, and with the characters that are trained told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from data.errors import DataError, RowError
from data.masking.answers import AnswerFinder, Rendering, edges_of_answers, trained_spans
from data.masking.template_check import check_template
from data.rows.columns import require_read
from data.rows.conversation import Conversation, count_pictures
from data.rows.plain import PLAIN_FORMATS, PlainRow, plain_row
from data.rows.registry import converter
from data.sources.chunks import RawRow
from data.templates.marks import Span
from data.templates.template import ChatTemplate, unread_variables
from data.tokenise.options import TokenizeOptions

# Sets of template variables, of rows that bring some, whose finders are kept.
_MOST_FINDERS = 64


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
        plain: What the row holds where it is no conversation; the text is empty if that is token ids.
    """

    raw: RawRow
    conversation: Conversation
    text: str
    spans: list[Span]
    edges: list[int]
    turns: int
    stopped: int
    plain: PlainRow | None = None


class RowRenderer:
    """Renders rows with one template.

    Args:
        options: Format, template and what of a row is trained.
    """

    def __init__(self, options: TokenizeOptions) -> None:
        self.options = options
        self.reasoning, self.loss_on = options.reasoning, options.loss_on
        self._finders: dict[str, AnswerFinder] = {}
        if options.format not in PLAIN_FORMATS:
            self.convert = converter(options.format, options.mapping)
            self.finder = self._new_finder({})

    def _new_finder(self, variables: Mapping[str, Any]) -> AnswerFinder:
        options = self.options
        day = date.fromisoformat(options.day) if options.day else None
        template = ChatTemplate(
            options.template, options.special_tokens, {**options.variables, **variables}, day
        )
        return AnswerFinder(
            template,
            options.special,
            list(options.added.values()),
            reasoning=options.reasoning,
            trust_blocks=options.trust_blocks,
        )

    def _finder_for(self, variables: Mapping[str, Any]) -> AnswerFinder:
        """The finder of rows with these template variables, which may change the template's headers."""
        if not variables:
            return self.finder
        key = json.dumps(variables, sort_keys=True)
        if key not in self._finders:
            finder = self._new_finder(variables)
            try:
                check_template(finder).require_usable()
            except DataError as error:
                raise RowError("bad template variables", f"{key[:80]}: {error}") from error
            if len(self._finders) == _MOST_FINDERS:
                self._finders.pop(next(iter(self._finders)))
            self._finders[key] = finder
        return self._finders[key]

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
            if self.options.format in PLAIN_FORMATS:
                return self._plain(raw, raw.row)
            return self._rendered(raw, self.convert(raw.row))
        except RecursionError as error:
            raise RowError("nested too deeply", "the row's values are nested too deeply") from error

    def _plain(self, raw: RawRow, row: Mapping[str, Any]) -> RowText:
        plain = plain_row(self.options.format, row, self.options.mapping)
        _require_unicode(plain.text)
        empty = Conversation([], unread=plain.unread)
        return RowText(raw, empty, plain.text, [(0, len(plain.text))], [], 0, 0, plain)

    def _rendered(self, raw: RawRow, conversation: Conversation) -> RowText:
        if conversation.pictures and self.options.images is None:
            raise RowError(
                "pictures or sound", f"the row has pictures, and {self.options.no_images}"
            )
        if conversation.variables:
            conversation = self._with_unread_variables(conversation)
        rendering = self._finder_for(conversation.variables).find(conversation)
        _require_unicode(rendering.text)
        if conversation.open_end:
            rendering = _without_last_stop(rendering, conversation)
        spans = trained_spans(rendering, conversation, self.reasoning, self.loss_on)
        stopped = sum(turn.stopped for turn in rendering.turns)
        edges = edges_of_answers(rendering, spans)
        return RowText(
            raw, conversation, rendering.text, spans, edges, len(rendering.turns), stopped
        )

    def _with_unread_variables(self, conversation: Conversation) -> Conversation:
        """A conversation that also says which of its own template variables nobody reads."""
        names = unread_variables(self.options.template, conversation.variables)
        mapping = self.options.mapping
        left = [f"chat_template_kwargs.{name}" for name in names]
        found = require_read(left, mapping.ignore_columns, mapping.strict_columns)
        return replace(conversation, unread=(*conversation.unread, *found))

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
            trained = row.conversation.trained
            shorter = replace(
                row.conversation,
                messages=[*messages[:first], *messages[cut:]],
                trained=[*trained[:first], *trained[cut:]],
                # No system prompt has pictures, so those of the oldest turns are the first.
                pictures=row.conversation.pictures[count_pictures(messages[first:cut]) :],
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


def _require_unicode(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad text", f"not valid Unicode ({error.reason})") from error


def _without_last_stop(rendering: Rendering, conversation: Conversation) -> Rendering:
    """The rendering whose last turn ends where its text does: what it goes on with is not known.

    Raises:
        RowError: the text cannot be found.
    """
    *turns, last = rendering.turns
    said = str(conversation.messages[-1]["content"]).rstrip()
    at = rendering.text.rfind(said, last.start, last.end) if said else -1
    if at < 0:
        raise RowError("bad prefix", "where the text of the last message ends cannot be told")
    end = max(at + len(said), last.reasoning_end or 0)
    return rendering._replace(turns=[*turns, last._replace(end=end, stopped=False)])
