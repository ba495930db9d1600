"""What anybody said comes out once, or the row is refused."""

import pytest

from data.errors import RowError
from data.rows.conversation import Conversation
from tests.data.conftest import CHATML
from tests.helpers.templates import GENERATION, THINKING, chat, finder

TOOL = {"role": "tool", "content": '{"sky": "clear"}'}


def with_result(*results):
    asked, answered = chat("Sky?", "It is clear.").messages
    return Conversation([asked, *(results or [TOOL]), answered])


@pytest.mark.parametrize("source", [CHATML, GENERATION])
@pytest.mark.parametrize("again", [False, True])
def test_results_of_tools_that_vanish_are_refused(source, again):
    # Once or twice the same: what the second says is in the text, the second is not.
    kept = "{%- for message in messages if message.role != 'tool' or message.first %}"
    drops = source.replace("{%- for message in messages %}", kept)
    results = [{**TOOL, "first": True}, TOOL] if again else [TOOL]
    assert finder(source).find(with_result(*results)).turns
    with pytest.raises(RowError, match=r"tool result dropped: .*message \d \(tool\)"):
        finder(drops).find(with_result(*results))


def test_a_result_that_vanishes_beside_what_is_said_twice_is_refused():
    """A copy of the question would stand for it in the count; of trusted blocks nothing is counted."""
    kept = "{%- for message in messages if message.role != 'tool' %}"
    twice = "message.content * (2 if message.role == 'user' else 1)"
    drops = CHATML.replace("{%- for message in messages %}", kept)
    for source, trusted in (
        (drops.replace("message.content", twice), False),
        (GENERATION.replace("{%- for message in messages %}", kept), True),
    ):
        with pytest.raises(RowError, match=r"tool result dropped: .*message 2 \(tool\)"):
            finder(source, trust_blocks=trusted).find(with_result())


@pytest.mark.parametrize("spell", ["message.content|tojson", "message.content|replace('\"', '')"])
def test_results_in_another_spelling_are_kept(spell):
    source = CHATML.replace(
        "message.content +", f"(({spell}) if message.role == 'tool' else message.content) +"
    )
    assert "clear" in finder(source).find(with_result()).text


@pytest.mark.parametrize("source", [CHATML, THINKING])
def test_reasoning_in_two_places_is_rendered_once_or_refused(source):
    said = "<think>\nSum.\n</think>\n\nFour."
    found = finder(source)
    text = found.find(chat("2 + 2?", said, reasoning_content="Sum.")).text
    assert text.count("Sum.") == 1
    assert text == found.find(chat("2 + 2?", "Four.", reasoning_content="Sum.")).text
    empty = "<think>\n\n</think>\n\nFour."
    assert found.find(chat("2 + 2?", empty, reasoning_content="Sum.")).text == text
    with pytest.raises(RowError, match="reasoning twice: message 2 has 'Add.' .* 'Sum.'"):
        found.find(chat("2 + 2?", said, reasoning_content="Add."))


def test_arguments_that_come_out_changed_are_refused():
    def call(city):
        function = {"name": "look", "arguments": {"city": city}}
        return chat("Where?", "", tool_calls=[{"type": "function", "function": function}])

    found = finder(THINKING)
    assert found.find(call('Ki"ga\\li\né')).turns
    loud = THINKING.replace(
        "call.function.arguments | tojson", "call.function.arguments|tojson|upper"
    )
    with pytest.raises(RowError, match="answer dropped|marks lost"):
        finder(loud).find(call("Kigali"))
