"""The assistant's turns by the ``{% generation %}`` blocks of a template, which its author placed.

A block says where an answer is, not that it is all of it: that everything the row says is in the
blocks is checked, with marks where the row is more than text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.errors import RowError
from data.masking.marked_rendering import MarkedRendering
from data.masking.turns import Turn, end_of_reasoning, is_plain, skip_space
from data.rows.conversation import Conversation, Message
from data.templates.headers import TurnMarkup
from data.templates.marks import Piece, Span, mark_conversation


class RenderedRow(NamedTuple):
    """A conversation as its template rendered it.

    Attributes:
        conversation: The conversation.
        messages: Its messages, in the forms that the template wants.
        text: The rendered text.
    """

    conversation: Conversation
    messages: list[Message]
    text: str


def turns_from_blocks(
    row: RenderedRow,
    blocks: Sequence[Span],
    markup: TurnMarkup,
    marked: Callable[[RenderedRow], MarkedRendering],
) -> list[Turn]:
    """The turns of a row whose template marks answers.

    Args:
        row: The row.
        blocks: Character spans that the template's blocks wrote.
        markup: Headers and stops of the template.
        marked: Renders the row with marks, which checks what is not plain text.

    Raises:
        RowError: the blocks do not hold what the row says.
    """
    text, roles = row.text, [message["role"] for message in row.messages]
    assistants = [index for index, role in enumerate(roles) if role == "assistant"]
    turns: list[Turn] = []
    previous_end = 0
    for begin, end in blocks:
        # A block of nothing but special tokens right after a finished turn is no answer.
        empty = not markup.tokens.sub("", text[begin:end]).strip()
        follows = turns and turns[-1].stopped and not text[previous_end:begin].strip()
        previous_end = end
        if empty and follows:
            continue
        message = assistants[len(turns)] if len(turns) < len(assistants) else -1
        turns.append(_turn_in_block(markup, text, begin, end, message, row.messages))
    if not turns:
        raise RowError("no generation block", "the template marked nothing in this row")
    one_each = len(turns) == len(assistants)
    plain = one_each and "tool" not in roles
    if plain and all(is_plain(row.messages[turn.message]) for turn in turns):
        for turn in turns:
            said = row.messages[turn.message]["content"].strip()
            if said not in text[turn.start : turn.end]:
                raise RowError("answer dropped", f"the template leaves out content {said[:60]!r}")
            markup.check_start(text, turn.start, text.index(said, turn.start))
        return turns
    return _checked_by_marks(row, turns, one_each, markup, marked)


def _turn_in_block(
    markup: TurnMarkup,
    text: str,
    begin: int,
    end: int,
    message: int,
    messages: Sequence[Message],
) -> Turn:
    stops = markup.stop_pattern
    previous = messages[message - 1] if message > 0 else None
    header = markup.header(previous["role"] if previous else None)
    start = begin + _overlap(header, text, begin, end)
    if start == begin:
        start -= _space_before(header, text, begin)
    start = markup.skip_opening(previous, text, start, end)
    found = list(stops.finditer(text, start, end))
    stopped = bool(found) and not markup.tokens.sub("", text[found[-1].end() : end]).strip()
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
        reasoning_end = skip_space(text, closing + len("</think>"), end)
    return Turn(message, start, end, reasoning_end, stopped)


def _checked_by_marks(
    row: RenderedRow,
    turns: list[Turn],
    one_each: bool,
    markup: TurnMarkup,
    render: Callable[[RenderedRow], MarkedRendering],
) -> list[Turn]:
    """See with marks that every piece lies in a block, and whose it is."""
    try:
        marked = render(row)
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
            markup.check_start(row.text, turn.start, _first_said(row, turn, pieces))
        return turns
    named: list[Turn] = []
    unplaced = list(zip(marked.pieces, marked.spans, strict=True))
    own: list[tuple[Piece, Span]] = []
    for turn in turns:
        inside = [(p, s) for p, s in unplaced if turn.start <= s[0] and s[1] <= turn.end]
        unplaced = [pair for pair in unplaced if pair not in inside]
        if not inside:
            raise RowError("no answer in a block", "a generation block holds no assistant text")
        markup.check_start(row.text, turn.start, inside[0][1][0])
        message = inside[-1][0].message
        if named and (named[-1].message, named[-1].end) == (message, turn.start):
            # One message in two adjoining blocks, reasoning and answer.
            turn = turn._replace(start=named.pop().start)
            inside = own + inside
        own = inside
        reasoning_end = end_of_reasoning(row.text, own, markup.tokens)
        named.append(turn._replace(message=message, reasoning_end=reasoning_end))
    if unplaced:
        piece = unplaced[0][0]
        raise RowError(
            "answer outside a block",
            f"{piece.kind} of message {piece.message + 1} is not in a generation block: "
            f"{(piece.text or '')[:60]!r}",
        )
    return named


def trusted_turns(row: RenderedRow, blocks: Sequence[Span], markup: TurnMarkup) -> list[Turn]:
    """A turn for every block, as its author placed it.

    Raises:
        RowError: something that the assistant says is in no block.
    """
    _, pieces = mark_conversation(row.messages)
    said = [piece for piece in pieces if piece.text is not None]
    turns: list[Turn] = []
    for begin, end in blocks:
        message = said[0].message if said else turns[-1].message if turns else -1
        at = begin
        while said:
            found = row.text.find(said[0].text or "", at, end)
            if found < 0:
                break
            at = found + len(said[0].text or "")
            message = said.pop(0).message
        closing = row.text.rfind("</think>", begin, end)
        reasoning_end = None
        if closing >= 0:
            reasoning_end = skip_space(row.text, closing + len("</think>"), end)
        stop = markup.stop_pattern.search(row.text, at, end) is not None
        turns.append(Turn(message, begin, end, reasoning_end, stop))
    if not turns:
        raise RowError("no generation block", "the template marked nothing in this row")
    if said:
        what = f"{said[0].kind} of message {said[0].message + 1}: {(said[0].text or '')[:60]!r}"
        raise RowError("answer outside a block", what)
    return turns


def _space_before(header: str | None, text: str, begin: int) -> int:
    """How much white space the template has between what the prompt ends with and a block."""
    space = begin - len(text[:begin].rstrip())
    if not header or text.endswith(header, 0, begin):
        return 0
    return next((n for n in range(1, space + 1) if text.endswith(header, 0, begin - n)), 0)


def _first_said(row: RenderedRow, turn: Turn, pieces: Sequence[Piece]) -> int:
    own = [piece.text for piece in pieces if piece.message == turn.message and piece.text]
    return min((row.text.index(said, turn.start) for said in own), default=turn.start)


def _overlap(header: str | None, text: str, begin: int, end: int) -> int:
    """How much of the header stands at the beginning of a generation block."""
    for length in range(min(len(header or ""), end - begin), 0, -1):
        assert header is not None
        outside = header[: len(header) - length]
        inside = text.startswith(header[-length:], begin, end)
        if inside and text.endswith(outside, 0, begin):
            return length
    return 0
