"""The self-test of a chat template: small conversations whose right answer is known.

Each probe ends in a verdict: ``exact``, ``refused`` with the rule that broke, or ``wrong``. A wrong
mask, or two methods that disagree, stops a run before training; a refusal of a probe that is not
basic only means that rows of that kind will be refused one by one, with the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data.errors import DataError, RowError
from data.masking.answers import AnswerFinder, Rendering
from data.masking.turns import Turn
from data.rows.conversation import Conversation, Message
from data.templates.marks import mark_conversation

Verdict = Literal["exact", "refused", "wrong"]

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "City."}},
                "required": ["city"],
            },
        },
    }
]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: object) -> Message:
    return {"role": "assistant", "content": text, **more}


@dataclass(frozen=True)
class Probe:
    """A conversation to try a template with.

    Attributes:
        name: What it tries.
        conversation: The messages.
        basic: Whether a template that refuses it is of no use.
    """

    name: str
    conversation: Conversation
    basic: bool = False


def probes() -> Iterator[Probe]:
    """The probes, fresh copies each time."""
    weather_call = {
        "type": "function",
        "id": "call12345",
        "function": {"name": "get_weather", "arguments": {"city": "Kigali"}},
    }
    one = [_user("Where is Lima?"), _assistant("In Peru.")]
    three = [
        *one,
        _user("And Oslo?"),
        _assistant("In Norway."),
        _user("And Accra?"),
        _assistant("In Ghana."),
    ]
    system: Message = {"role": "system", "content": "Be brief."}
    result: Message = {
        "role": "tool",
        "content": '{"sky": "clear"}',
        "name": "get_weather",
        "tool_call_id": "call12345",
    }
    yield Probe("one turn", Conversation(one), basic=True)
    yield Probe("three turns", Conversation(three), basic=True)
    yield Probe("system", Conversation([system, *one]))
    yield Probe(
        "tool call",
        Conversation(
            [
                _user("Sky over Kigali?"),
                _assistant("", tool_calls=[weather_call]),
                result,
                _assistant("It is clear."),
            ],
            tools=_TOOLS,
        ),
    )
    yield Probe(
        "tool call with text",
        Conversation(
            [
                _user("Sky over Kigali?"),
                _assistant("Let me look.", tool_calls=[weather_call]),
                result,
                _assistant("It is clear."),
                _user("Thanks."),
                _assistant("Gladly."),
            ],
            tools=_TOOLS,
        ),
    )
    yield Probe(
        "reasoning",
        Conversation([_user("Two plus two?"), _assistant("Four.", reasoning_content="2 + 2 = 4")]),
    )
    yield Probe(
        "reasoning in content",
        Conversation([_user("Two plus two?"), _assistant("<think>\n2 + 2 = 4\n</think>\n\nFour.")]),
    )
    yield Probe(
        "reasoning in an earlier turn",
        Conversation(
            [
                _user("Two plus two?"),
                _assistant("Four.", reasoning_content="2 + 2 = 4"),
                _user("Plus one?"),
                _assistant("Five.", reasoning_content="4 + 1 = 5"),
            ]
        ),
    )
    yield Probe("empty answer", Conversation([_user("Say nothing."), _assistant("")]))
    yield Probe(
        "unicode",
        Conversation([_user("Grüße 👋🏽?"), _assistant("こんにちは 👩‍👩‍👧 e\u0301 — ½\u00a0ok")]),
    )
    yield Probe(
        "white space",
        Conversation([_user("  Code? \n"), _assistant("\n    if x:\n        y()\n\n")]),
    )
    yield Probe(
        "markup in content",
        Conversation(
            [
                _user("Print {{ x }} and <|assistant|> and </s>."),
                _assistant("{% raw %} <b>&amp;</b> [INST] <|user|> **x**"),
                _user("assistant\n"),
                _assistant("user\nassistant\n"),
            ]
        ),
    )


@dataclass
class ProbeResult:
    """What became of one probe.

    Attributes:
        name: The probe.
        verdict: ``exact``, ``refused`` or ``wrong``.
        detail: The rule that broke; the trained text when exact.
        basic: Whether the template is of no use without it.
    """

    name: str
    verdict: Verdict
    detail: str
    basic: bool


@dataclass
class TemplateReport:
    """The self-test of one template.

    Attributes:
        method: How answers are found in it.
        stops: Texts that end an assistant turn.
        results: One for each probe.
        stop_is_token: Whether stops are tokens of the tokenizer, not mere text.
        stops_last: Whether a last turn ends with a stop.
    """

    method: str
    stops: list[str]
    stop_is_token: bool = True
    results: list[ProbeResult] = field(default_factory=list)
    stops_last: bool = True

    @property
    def usable(self) -> bool:
        """Whether the basic probes are exact and none is wrong."""
        return all(
            result.verdict == "exact" or (result.verdict == "refused" and not result.basic)
            for result in self.results
        )

    def require_usable(self) -> None:
        """Stop the run when the template cannot be trusted.

        Raises:
            DataError: a basic probe failed, or a mask came out wrong.
        """
        for result in self.results:
            if result.verdict == "wrong" or (result.verdict == "refused" and result.basic):
                raise DataError(
                    f"the chat template cannot be masked: probe '{result.name}' is "
                    f"{result.verdict} ({result.detail}). Pass --chat-template with a template "
                    "that renders every turn, or mark answers with {% generation %} in it; blocks that "
                    "are right all the same are taken as they are with --trust-generation-blocks."
                )


def check_template(finder: AnswerFinder) -> TemplateReport:
    """Try every probe with a template; with both methods where it has generation blocks."""
    report = TemplateReport(finder.method, finder.markup.stops, finder.markup.stop_is_token)
    for probe in probes():
        verdict, detail = _try(finder, probe, report)
        report.results.append(ProbeResult(probe.name, verdict, detail, probe.basic))
    return report


def _try(finder: AnswerFinder, probe: Probe, report: TemplateReport) -> tuple[Verdict, str]:
    conversation = probe.conversation
    try:
        rendering = finder.find(conversation)
    except RowError as error:
        return "refused", str(error)
    wrong = _contradiction(rendering, conversation, finder)
    if wrong and not finder.trust_blocks:
        return "wrong", wrong
    if finder.method == "generation" and not finder.trust_blocks:
        try:
            other = finder.find(conversation, "marks")
        except RowError:
            other = rendering  # what marks cannot tell, the template's author does
        if not _same_but_for_space(rendering.text, rendering.turns, other.turns):
            return "wrong", (
                "{% generation %} blocks give "
                f"{[rendering.text[t.start : t.end] for t in rendering.turns]}, "
                f"marks give {[other.text[t.start : t.end] for t in other.turns]}"
            )
    if probe.name == "one turn":
        report.stops_last = rendering.turns[-1].stopped
    return "exact", " | ".join(rendering.text[t.start : t.end] for t in rendering.turns)


def _same_but_for_space(text: str, one: Sequence[Turn], other: Sequence[Turn]) -> bool:
    """Whether turns begin and end at the same places, white space between them aside."""
    if len(one) != len(other):
        return False
    edges = [
        sorted(pair)
        for a, b in zip(one, other, strict=True)
        for pair in ((a.start, b.start), (a.end, b.end))
    ]
    return not any(text[first:last].strip() for first, last in edges)


def _contradiction(
    rendering: Rendering, conversation: Conversation, finder: AnswerFinder
) -> str | None:
    """What is wrong with the turns, told from the messages alone; None when nothing is."""
    tokens = finder.markup.tokens
    droppable = finder.may_drop_reasoning_before(conversation.messages)
    _, pieces = mark_conversation(conversation.messages)
    texts: dict[int, str] = {}  # a template may write one message in several stretches
    for turn in rendering.turns:
        text = rendering.text[turn.start : turn.end]
        texts[turn.message] = texts.get(turn.message, "") + text
        for token in tokens.finditer(rendering.text):
            if token.start() < turn.start < token.end():
                return f"turn {turn.message + 1} begins inside {token.group()!r}"
    # The token that follows a finished turn opens the next message.
    after = [tokens.match(rendering.text[t.end :].lstrip()) for t in rendering.turns[:-1]]
    openers = {token.group() for token in after if token}
    messages = {piece.message for piece in pieces}
    if set(texts) != messages:
        return f"answers {sorted(messages)} were given, answers {sorted(texts)} would be trained"
    for index, text in texts.items():
        at = dict.fromkeys(("reasoning", "content", "tool"), 0)  # calls may come before the content
        first = len(text)
        for piece in pieces:
            if piece.message != index or not piece.text:
                continue
            found = text.find(piece.text, at[piece.kind])
            if found < 0 and piece.kind == "reasoning" and index < droppable:
                continue
            if found < 0:
                return f"turn {index + 1} trains {text!r}, which lacks {piece.text!r}"
            first = min(first, found)
            at[piece.kind] = found + len(piece.text)
        if any(opener in text[:first] for opener in openers):
            return f"turn {index + 1} trains {text!r}, which opens with another message"
        for message in conversation.messages:
            said = str(message["content"]).strip()
            if message["role"] != "assistant" and len(said) > 10 and said in text:
                return f"turn {index + 1} trains {text!r}, which {message['role']} said"
    return None
