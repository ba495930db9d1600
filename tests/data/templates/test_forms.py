import pytest

from data.rows.messages import conversation_from_messages
from tests.helpers.templates import THINKING, finder

GIVEN = (
    r'{"z": [1, -2.5, 1e3, -0], "a": 0, "a": 123456789012345678901, "\u00e9": "\u4e2d\/", "n": NaN}'
)
TRAINED = '{"z": [1, -2.5, 1000.0, 0], "a": 123456789012345678901, "é": "中/", "n": NaN}'


@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_are_trained_as_json_writes_them(as_text):
    """Only the spelling of numbers and escapes changes; templates may want text or objects."""
    source = THINKING
    if as_text:  # as DeepSeek's
        source = source.replace("call.function.arguments | tojson", "'' + call.function.arguments")
    for message in (
        {"from": "function_call", "value": f'{{"name": "look", "arguments": {GIVEN}}}'},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": GIVEN}}]},
    ):
        conversation = conversation_from_messages([{"role": "user", "content": "Hi"}, message])
        found = finder(source)
        assert found.forms.arguments_as_text == as_text
        rendering = found.find(conversation)
        (turn,) = rendering.turns
        assert f"look {TRAINED}\n" in rendering.text[turn.start : turn.end]
