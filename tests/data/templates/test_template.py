"""A rendering is a function of its inputs, and holds nothing that nobody wrote."""

from datetime import date

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import DataError, RowError
from data.templates.template import ChatTemplate
from tests.helpers.templates import chat, finder

CALLS = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '{"name": "' + call.function.name + '", "arguments": ' }}
        {{- 'WHOLE' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".replace("' }}\n        {{- 'WHOLE' }}", "' + (call.function.arguments|tojson|safe) + '}' }}")


@pytest.mark.parametrize("arguments", [{"city": 'Ki"gali & <co>'}, '{"city": "Kigali"}'])
def test_joined_calls_are_what_transformers_writes_without_escapes(arguments):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    conversation = chat("Where?", "", tool_calls=[call])
    plain = CALLS.replace("|safe", "")
    messages = conversation.messages
    expected = render_jinja_template([messages], chat_template=plain)[0][0]
    assert ChatTemplate(CALLS).render(messages) == expected
    assert "&#34;name" in render_jinja_template([messages], chat_template=CALLS)[0][0]
    found = finder(CALLS)
    turns = found.find(conversation).turns
    assert "&" not in found.find(chat("A", "B")).text and len(turns) == 1


def test_a_template_that_escapes_by_itself_is_refused():
    escaping = CALLS.replace(" + m.content }}", " }}{{ m.content|e }}")
    with pytest.raises(RowError, match="escaped text.*&#34;"):
        finder(escaping).find(chat('Say "a".', "a"))
    assert finder(escaping).find(chat("Say a.", "a")).turns
    said = chat("What is &#34;?", "A quote: &#34;")
    assert "&#34;" in finder(CALLS).find(said).text  # somebody said it


def test_a_template_that_takes_all_memory_is_refused():
    with pytest.raises(RowError, match="more than there is memory for"):
        ChatTemplate("{{ 'a' * 10**18 }}").render([])


def test_the_clock_is_an_input_and_chance_is_none():
    dated = "{{ strftime_now('%d %B %Y, %H:%M') }}" + CALLS
    template = ChatTemplate(dated, day=date(2024, 2, 29))
    assert template.render([]).startswith("29 February 2024, 00:00")
    assert template.day == date(2024, 2, 29)
    assert ChatTemplate(dated).day == date.today()
    assert ChatTemplate(CALLS, day=date(2024, 2, 29)).day is None
    for chance in ("{{ [1, 2]|random }}", "{{ lipsum() }}"):
        with pytest.raises((DataError, RowError)):
            ChatTemplate(chance).render([])
