"""Numbers in a tool call's arguments are trained as the assistant spelled them."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.conversation import Conversation
from data.errors import RowError
from data.messages import conversation_from_messages
from data.spelled_json import SpelledNumber, parse_spelled, to_json
from tests.data.templates import THINKING, finder

ODD = '{"a": 1e3, "b": [0.10, -0, 1E400, 12345678901234567890.123456789], "c": {"d": 1.50e-7}}'


def test_odd_spellings_come_back_and_usual_numbers_stay_plain():
    value = parse_spelled(ODD)
    assert to_json(value) == to_json(value, ensure_ascii=False) == ODD
    assert str(pickle.loads(pickle.dumps(value))) == str(value)
    assert value["a"] == 1000
    plain = parse_spelled('[1, -2.5, 1.0, 1e+16, true, null, "1e3"]')
    assert not any(isinstance(item, SpelledNumber) for item in plain)
    with pytest.raises(RowError, match="FDD6"):
        to_json([parse_spelled("1e3"), "\ufdd6"])
    with pytest.raises(TypeError):
        to_json({"a": object()})


@given(st.recursive(st.from_regex(r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?([eE][+-]?[0-9]{1,3})?",
                                  fullmatch=True).map(lambda text: [text]),
                    lambda inner: st.lists(inner, max_size=4)))  # fmt: skip
def test_any_number_anywhere_is_spelled_as_it_was(tree):
    text = json.dumps(tree).replace('"', "")
    assert to_json(parse_spelled(text)) == text


@pytest.mark.parametrize("as_text", [False, True])
def test_trained_calls_spell_numbers_as_the_row_does(as_text):
    source = THINKING
    if as_text:  # as DeepSeek's, which takes arguments as text
        source = source.replace("call.function.arguments | tojson", "'' + call.function.arguments")
    for message in (
        {"from": "function_call", "value": f'{{"name": "look", "arguments": {ODD}}}'},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": ODD}}]},
    ):
        rows = [{"role": "user", "content": "Hi"}, message]
        conversation = conversation_from_messages(rows)
        assert isinstance(conversation, Conversation)
        found = finder(source)
        assert found.forms.arguments_as_text == as_text
        rendering = found.find(conversation)
        (turn,) = rendering.turns
        assert f"look {ODD}\n" in rendering.text[turn.start : turn.end]
