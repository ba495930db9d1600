"""Calls without an id, or with another vendor's, reach templates that are particular about them."""

import re

import pytest

from data.errors import RowError
from data.rows.conversation import Conversation
from data.templates.tool_call_ids import with_call_ids
from tests.helpers.templates import finder

# Writes ids of calls, takes nothing but nine characters, and writes the id after the result.
MISTRAL = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}{{ 'CALL ' }}
        {%- for call in m.tool_calls %}
            {%- if call.id|length != 9 %}{{ raise_exception('nine!') }}{% endif %}
            {{- call.function.name + ' ' + call.function.arguments|tojson + ' ' + call.id + ';' }}
        {%- endfor %}{{ '</s>' }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id|length != 9 %}{{ raise_exception('nine!') }}{% endif %}
        {{- '[RESULT]' + m.content + ' of ' + m.tool_call_id + '[/RESULT]' }}
    {%- else %}{{ m.content + '</s>' }}{% endif %}
{%- endfor %}
"""


def call(name, call_id=None):
    entry = {"type": "function", "function": {"name": name, "arguments": {"q": name}}}
    return entry if call_id is None else {**entry, "id": call_id}


def two_calls(*ids):
    """A conversation with two calls and their results, with the given ids or none."""
    ids = ids or (None, None)
    results = [{"role": "tool", "content": f"result {n}"} for n in (1, 2)]
    return [
        {"role": "user", "content": "Both, please."},
        {"role": "assistant", "content": "", "tool_calls": [call("a", ids[0]), call("b", ids[1])]},
        # Results with ids may come in another order.
        *(
            results
            if ids[0] is None
            else [
                {**result, "tool_call_id": call_id}
                for result, call_id in zip(results, reversed(ids), strict=True)
            ]
        ),
        {"role": "assistant", "content": "Done."},
    ]


def ids_of(messages):
    calls = [c["id"] for m in messages for c in m.get("tool_calls", [])]
    return calls, [m["tool_call_id"] for m in messages if m["role"] == "tool"]


def test_calls_without_ids_get_one_and_their_results_the_same_in_order():
    calls, results = ids_of(with_call_ids(two_calls(), "needed"))
    assert calls == results
    assert len(set(calls)) == 2
    assert all(re.fullmatch("[0-9a-z]{9}", each) for each in calls)
    assert with_call_ids(two_calls(), "needed") == with_call_ids(two_calls(), "nine")


def test_ids_of_the_data_are_kept_where_the_template_takes_them():
    given = ("call_0123456789", "call_abcdefghij")
    assert ids_of(with_call_ids(two_calls(*given), "needed"))[0] == list(given)
    calls, results = ids_of(with_call_ids(two_calls(*given), "nine"))
    assert results == calls[::-1]
    assert all(re.fullmatch("[0-9a-z]{9}", each) for each in calls)
    nine = ("AAAAAAAA1", "BBBBBBBB2")
    assert with_call_ids(two_calls(*nine), "nine") == two_calls(*nine)
    assert with_call_ids(two_calls(), "as is") == two_calls()


@pytest.mark.parametrize(
    "ids", [(), ("call_0123456789", "call_abcdefghij"), ("123456789", "987654321")]
)
def test_a_template_that_wants_nine_characters_renders_any_calls(ids):
    found = finder(MISTRAL)
    assert found.forms.call_ids == "nine"
    rendering = found.find(Conversation(two_calls(*ids)))
    calls, _ = ids_of(with_call_ids(two_calls(*ids), "nine"))
    texts = [rendering.text[turn.start : turn.end] for turn in rendering.turns]
    # The second result's id stands in the header before the last answer.
    assert texts == [f'CALL a {{"q": "a"}} {calls[0]};b {{"q": "b"}} {calls[1]};</s>', "Done.</s>"]
    assert finder(MISTRAL.replace("length != 9", "length == 0")).forms.call_ids == "needed"
    # One that repeats the callee's name before the result.
    named = MISTRAL.replace(
        "{{- call.function.name", "{%- set ns.n = call.function.name %}{{- ns.n"
    )
    named = "{%- set ns = namespace(n='') %}" + named.replace("'[RESULT]'", "'[RESULT]' + ns.n")
    assert finder(named).forms.call_ids == "nine"


def test_a_result_without_a_call_is_refused_by_the_template_with_advice():
    messages = [m for m in two_calls() if not m.get("tool_calls")]
    with pytest.raises(RowError, match=r"the row calls tools; --chat-template FILE"):
        finder(MISTRAL).find(Conversation(messages))
