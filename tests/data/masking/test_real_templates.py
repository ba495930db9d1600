"""What the templates of the test data do to reasoning, with our mending and without it."""

import pytest

from benchmarks.template_survey import tokens_named_in
from data.errors import RowError
from data.masking.answers import AnswerFinder, trained_spans
from data.rows.conversation import Conversation
from data.templates.reasoning import keep_reasoning
from data.templates.template import ChatTemplate


@pytest.mark.slow
def test_no_template_trains_an_empty_think_block(test_data):
    empty = "<think>\n\n</think>\n\n"
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}] * turns
        for said in (empty + "Hello.", "Hello.")
        for turns in (1, 2)
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    trained = 0
    for path in sorted(test_data.glob("chat_templates/*/*.jinja")):
        source = keep_reasoning(path.read_text())[0]
        own = tokens_named_in(source)
        finder = AnswerFinder(ChatTemplate(source, names), own)
        for messages in rows:
            conversation = Conversation(messages)
            for method in {finder.method, "marks"}:
                try:
                    rendering = finder.find(conversation, method)
                except RowError:
                    continue
                trained += 1
                for begin, end in trained_spans(rendering, conversation):
                    assert "think" not in rendering.text[begin:end].lower(), path.name
    assert trained > 400


@pytest.mark.parametrize(
    ("name", "drops"),
    [
        ("llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B", True),
        ("trl/qwen3", True),
        ("trl/phi3", False),
    ],
)
def test_templates_that_drop_reasoning_are_mended(test_data, name, drops):
    source = (test_data / f"chat_templates/{name}.jinja").read_text()
    kept, removed = keep_reasoning(source)
    assert bool(removed) == drops
    thought = "<think>\nsum\n</think>\n\nFour."
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert ("sum" in ChatTemplate(source, names).render(messages)) != drops
    assert "sum" in ChatTemplate(kept, names).render(messages)
