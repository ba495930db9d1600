"""Shapes of templates whose masks are exact although blocks, prompts and histories differ."""

import pytest

from data.errors import DataError
from data.masking.answers import AnswerFinder
from data.masking.template_check import check_template
from data.templates.template import ChatTemplate
from tests.helpers.templates import GENERATION, chat, finder

TOKENS = """<|im_start|> <|im_end|> <|user|> <|assistant|> <|observation|> <|start|> <|message|> <|channel|>
<|end|> <|return|> <start_of_turn> <end_of_turn> <|channel> <channel|>""".split()

# The prompt opens a think block; an answer without reasoning closes it in the history.
CLOSED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>' + ('<think>' + m.reasoning_content if m.reasoning_content else '') }}
        {{- '</think>' + m.content }}
    {%- else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}
"""
# The prompt opens a channel for reasoning; an answer without any is in another one.
CHANNELS = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning_content %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
    {%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|channel|>analysis<|message|>' }}{% endif %}
"""
# The prompt opens a block, or has one that is empty, and so has the history, or not.
GEMMA = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}
        {%- if m.reasoning_content %}{{ '<|channel>thought\\n' + m.reasoning_content + '<channel|>' }}
        {%- else %}{{ 'EMPTY' }}{% endif %}
        {{- m.content + '<end_of_turn>\\n' }}
    {%- else %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\nPROMPT' }}{% endif %}
"""
OPEN, NOTHING = "<|channel>thought\\n", "<|channel>thought\\n<channel|>"


def trained(source, *said, **last):
    found = AnswerFinder(ChatTemplate(source), TOKENS)
    report = check_template(found)
    report.require_usable()
    assert {"one turn", "three turns", "reasoning"} <= {
        result.name for result in report.results if result.verdict == "exact"
    }
    rendering = found.find(chat("2 + 2?", *said, **last))
    return [rendering.text[turn.start : turn.end] for turn in rendering.turns]


def gemma(empty, prompt):
    return GEMMA.replace("EMPTY", empty).replace("PROMPT", prompt)


@pytest.mark.parametrize(
    ("source", "plain", "thought"),
    [
        (CLOSED, "Four.", "Sum.</think>Four."),
        (
            CHANNELS,
            "Four.<|return|>",
            "Sum.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        ),
        (gemma("", OPEN), "Four.<end_of_turn>", "Sum.<channel|>Four.<end_of_turn>"),
        (gemma(NOTHING, OPEN), "Four.<end_of_turn>", "Sum.<channel|>Four.<end_of_turn>"),
        (
            gemma(NOTHING, NOTHING),
            "Four.<end_of_turn>",
            "<|channel>thought\nSum.<channel|>Four.<end_of_turn>",
        ),
    ],
)
def test_what_a_prompt_opens_is_not_trained(source, plain, thought):
    assert trained(source, "Four.") == [plain]
    assert trained(source, "Four.", reasoning_content="Sum.") == [thought]


CALLS = (
    "{% for c in message.tool_calls or [] %}"
    "{{ '[' + c.function.name + ' ' + c.function.arguments|tojson + ']' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("front", "inside", "expected"),
    [
        # A line break more than in the prompt is the model's to write.
        ("{{- '\\n' }}", "", "\nFour.<|im_end|>"),
        ("", "{{ ' ' }}", " Four.<|im_end|>"),
        ("", CALLS, '[add {"a": "b"}]Four.<|im_end|>'),
    ],
)
def test_blocks_that_differ_by_white_space_and_calls_before_text_are_exact(front, inside, expected):
    block = "{%- generation %}"
    assert block in GENERATION
    source = GENERATION.replace(block, f"{front}{{%- generation %}}{inside}")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "b"}}}
    more = {"tool_calls": [call]} if inside == CALLS else {}
    found = finder(source)
    check_template(found).require_usable()
    conversation = chat("2 + 2?", "Four.", **more)
    for method in ("generation", "marks"):
        text = found.find(conversation, method)
        assert [text.text[turn.start : turn.end] for turn in text.turns] == [expected], method


def test_blocks_are_taken_as_they_are_when_told():
    source = GENERATION.replace(
        "{%- generation %}{{ message.content", "{{- 'Well: ' }}{% generation %}{{ message.content"
    )
    assert source != GENERATION
    with pytest.raises(DataError, match="--trust-generation-blocks"):
        check_template(finder(source)).require_usable()
    found = finder(source, trust_blocks=True)
    check_template(found).require_usable()
    rendering = found.find(chat("2 + 2?", "Four.", "Sure?", "Yes."))
    assert [(turn.message, rendering.text[turn.start : turn.end]) for turn in rendering.turns] == [
        (1, "Four.<|im_end|>\n"),
        (3, "Yes.<|im_end|>\n"),
    ]
    lost = source.replace("{{ message.content", "{{ 'It is ' }}{# #}{{ '' ")
    with pytest.raises(DataError, match="answer outside a block"):
        check_template(finder(lost, trust_blocks=True)).require_usable()
