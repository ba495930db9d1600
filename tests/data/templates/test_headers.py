"""Headers: what stands before an answer is never trained, whatever the generation prompt is."""

import pytest

from benchmarks.template_survey import tokens_named_in
from data.errors import DataError, RowError
from data.masking.answers import AnswerFinder, trained_spans
from data.masking.template_check import _contradiction, check_template
from data.rows.conversation import Conversation
from data.templates.headers import TurnMarkup
from data.templates.template import ChatTemplate
from tests.data.conftest import CHATML
from tests.helpers.templates import THINKING, chat, finder

CALL = {"type": "function", "id": "c", "function": {"name": "look", "arguments": {"q": "x"}}}
TOOLS = Conversation(
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "found", "tool_call_id": "c", "name": "look"},
        {"role": "assistant", "content": "Hello."},
    ]
)
# After a tool's message the answer follows a line break that the generation prompt lacks.
UNEVEN = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ '\\n' + c.function.name + c.function.arguments|tojson }}"
    "{%- endfor %}"
    "{%- if m.role == 'tool' %}{{ '\\n' if not loop.last }}<|im_end|>"
    "{%- else %}{{ '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The generation prompt names another speaker than answered conversations do.
OTHER_NAME = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")


def trained(source, conversation):
    rendering = finder(source).find(conversation)
    return [rendering.text[a:b] for a, b in trained_spans(rendering, conversation)]


def test_header_after_a_tool_is_whole_where_the_prompt_differs_earlier():
    assert trained(UNEVEN, TOOLS) == ['\nlook{"q": "x"}<|im_end|>', "Hello.<|im_end|>"]


def test_prompt_with_an_instruction_before_the_speaker_gives_the_whole_header():
    source = CHATML.replace(
        "'<|im_start|>assistant\\n'",
        "'<|im_start|>system\\nAct.<|im_end|>\\n<|im_start|>assistant\\n'",
    )
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    assert trained(source, conversation) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_prompt_that_names_another_speaker_is_refused():
    with pytest.raises(RowError, match="header not found"):
        trained(OTHER_NAME, chat("Hi", "Hello."))
    with pytest.raises(DataError, match="cannot be masked"):
        check_template(finder(OTHER_NAME)).require_usable()


@pytest.mark.parametrize(
    ("cut", "problem"),
    [("<|im_end|>\n<|im_st", "inside a token"), ("<|im_end|>\n", "before the answer holds")],
)
@pytest.mark.parametrize("method", ["marks", "generation"])
def test_a_header_cut_short_refuses_rows_and_is_wrong_in_the_self_test(
    monkeypatch, cut, problem, method
):
    source = CHATML
    if method == "generation":
        source = (
            "{%- for message in messages %}{%- if message.role == 'assistant' %}{% generation %}"
            "{{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}{% endgeneration %}"
            "{{- '\\n' }}{%- else %}"
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
            "{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
        )
    found = finder(source)
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    assert len(found.find(conversation).turns) == 2
    whole = found.markup.header("user")
    found = finder(source)
    monkeypatch.setattr(TurnMarkup, "header_in", lambda self, gap, previous: cut)
    monkeypatch.setattr(TurnMarkup, "header", lambda self, role: whole)
    monkeypatch.setattr(
        "data.masking.generation_blocks._overlap", lambda *_: len(cut) - len("<|im_end|>\n")
    )
    with pytest.raises(RowError, match=problem):
        found.find(conversation)
    monkeypatch.setattr(TurnMarkup, "check_start", lambda *_: None)
    wrong = _contradiction(found.find(conversation), conversation, found)
    assert wrong is not None
    assert "begins inside" in wrong or "opens with another message" in wrong


def test_tool_answers_of_hermes_train_no_header(test_data):
    name = "llama.cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use"
    source = (test_data / f"chat_templates/{name}.jinja").read_text()
    schema = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    schema["description"] = "d"
    conversation = Conversation(TOOLS.messages, [{"type": "function", "function": schema}])
    assert trained(source, conversation)[1] == "Hello.<|im_end|>"


def test_plain_answers_of_command_r_tool_use_train_no_header(test_data):
    name = "llama.cpp/CohereForAI-c4ai-command-r-plus-tool_use"
    source = (test_data / f"chat_templates/{name}.jinja").read_text()
    found = finder(source)
    found = type(found)(found.template, tokens_named_in(source))
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    rendering = found.find(conversation)
    spans = [rendering.text[a:b] for a, b in trained_spans(rendering, conversation)]
    assert spans == ["Hello.<|END_OF_TURN_TOKEN|>", "Bye.<|END_OF_TURN_TOKEN|>"]


@pytest.mark.parametrize("asked", ["Hi", "Hi \n", "Hi\n\n [/INST]\n"])
@pytest.mark.parametrize("before", ["[/INST]", " [/INST]", "\n"])
def test_white_space_at_the_end_of_a_question_is_not_header(asked, before):
    # Tags that are no tokens, as Mistral's with its older tokenizer.
    source = (
        "{%- for m in messages %}{{ '[INST]' + m.content + before if m.role == 'user' "
        "else m.content + '</s>' }}{%- endfor %}"
    )
    source = "{%- set before = " + repr(before) + " %}" + source
    conversation = chat(asked, "  Hello.", asked, "Bye.")
    assert trained(source, conversation) == ["  Hello.</s>", "Bye.</s>"]


def test_what_ends_a_call_does_not_end_turns():
    # A tokenizer that has no <|im_end|>, but </tool_call>: the stop is text, and told as such.
    template = ChatTemplate(THINKING, {})
    found = AnswerFinder(template, [], ["<tool_call>", "</tool_call>"])
    assert found.markup.stops == ["<|im_end|>"]
    assert not found.markup.stop_is_token
    rendering = found.find(chat("Hi", "Hello."))
    assert [rendering.text[t.start : t.end] for t in rendering.turns] == ["Hello.<|im_end|>"]
