"""What a template writes after an answer, learned from the template itself.

A *stop* is the run of special tokens that first follows an answer, both in the last turn and in an
earlier one; where the two differ, each has its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from os.path import commonprefix

from data.errors import RowError
from data.rows.conversation import Message
from data.templates.marks import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    OTHER_CLOSE,
    OTHER_OPEN,
    mark_conversation,
)
from data.templates.probe_messages import ANSWER, ASK, CALL, RESULT, render_probe
from data.templates.template import ChatTemplate

_ANY_MARK = re.compile(f"[{ANSWER_OPEN}-{OTHER_CLOSE}]")
Forms = Callable[[Sequence[Message]], list[Message]]


def learn_stops(
    template: ChatTemplate, forms: Forms, tiers: Sequence[re.Pattern[str]]
) -> list[str]:
    """The texts that end turns; the most usual one first.

    Args:
        template: The template.
        forms: Brings messages into the form that the template wants.
        tiers: Tokens among which stops are looked for; later ones where the first find none.
    """
    last = _tail(template, forms([ASK, ANSWER]))
    middle = _tail(template, forms([ASK, ANSWER, ASK, ANSWER]))
    called = _tail(template, forms([ASK, CALL, RESULT, ANSWER]))
    open_call = _tail(template, forms([ASK, CALL]))
    shared = commonprefix([last or "", middle or ""])
    stops: list[str] = []
    for tier in tiers:
        openers = _openers(template, forms([ASK]), tier)
        run = tier.search(shared)
        if run:
            stops.append(_run_of(tier, shared, run.start(), openers))
        _add_stops_of(stops, (last, middle), tier, openers)
        if stops:  # else what ends a call, such as </tool_call>, is not what ends turns
            _add_stops_of(stops, (called, open_call), tier, openers)
            return stops
    return [shared.rstrip()] if shared.strip() else []


def _add_stops_of(
    stops: list[str], tails: Sequence[str | None], tier: re.Pattern[str], openers: set[str]
) -> None:
    for tail in tails:
        # A stop that is known already may stand behind the closing tags of a tool call.
        if tail and not any(stop in tail for stop in stops):
            found = tier.search(tail)
            # GLM has no other stop than the next speaker's opening; others do.
            if found and not (stops and found.group() in openers):
                stops.append(found.group())


def _openers(
    template: ChatTemplate, messages: Sequence[Message], tier: re.Pattern[str]
) -> set[str]:
    """Tokens that open a message: a few templates write the next one's after the last turn."""
    try:
        before = render_probe(template, messages).partition(OTHER_OPEN)[0]
    except RowError:
        return set()
    found = list(tier.finditer(before))
    openers: set[str] = set()
    end = len(before.rstrip())
    for match in reversed(found):
        if match.end() != end:
            break
        openers.add(match.group())
        end = match.start()
    return openers


def _tail(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """What follows the first assistant message, up to the next thing that anybody says."""
    try:
        text = render_probe(template, messages)
    except RowError:
        return None
    _, pieces = mark_conversation(messages)
    count = sum(piece.message == pieces[0].message for piece in pieces)
    closes = [place for place, char in enumerate(text) if char == ANSWER_CLOSE]
    if len(closes) < count:
        return None
    return _ANY_MARK.split(text[closes[count - 1] + 1 :], maxsplit=1)[0]


def _run_of(pattern: re.Pattern[str], text: str, begin: int, openers: set[str]) -> str:
    """The tokens that follow each other from ``begin`` on, up to one that opens a message."""
    end = begin
    while found := pattern.match(text, end):
        if end > begin and found.group() in openers:
            break
        end = found.end()
    return text[begin:end]
