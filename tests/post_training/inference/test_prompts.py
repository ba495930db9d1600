"""A question is rendered as training renders the same row."""

import copy
from datetime import date

import pytest

from data import prepare_documents
from data.errors import DataError
from post_training.inference.exact_match import read_questions
from post_training.inference.prompts import Prompts
from tests.helpers.models import make_tokenizer
from tests.helpers.rows import write_rows
from tests.helpers.templates import GENERATION, THINKING

# Reads a variable, the clock and the tools; wants content in parts and arguments as text.
PARTS = """\
{%- if loud %}{{ '<|im_start|>system\\nLOUD' }}{{ strftime_now('%Y') }}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- for part in message.content %}{{ part.text }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "two and two"},
    {"role": "user", "content": "And the sky?"},
    {"role": "assistant", "content": "Blue."},
]
PLAIN = [{key: turn[key] for key in ("role", "content")} for turn in TURNS]


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (PARTS, {"messages": PLAIN, "chat_template_kwargs": {"loud": True}}),
        (PARTS, {"messages": PLAIN, "chat_template_kwargs": '{"loud": false}'}),
        (THINKING, {"messages": TURNS}),
        (GENERATION, {"messages": PLAIN}),
    ],
    ids=["parts-loud", "parts-quiet", "thinking", "generation"],
)
def test_a_question_begins_as_the_row_does_in_training(tmp_path, template, row):
    tokenizer = copy.copy(make_tokenizer())
    tokenizer.chat_template = template
    file = write_rows(tmp_path / "row.jsonl", [row])
    documents = prepare_documents(
        files=[str(file)],
        tokenizer=tokenizer,
        seq_length=512,
        cache_dir=None,
        workers=0,
        loss_on="last",
        template_date="2024-02-29",
    )
    ids, mask = documents[0]
    prompts = Prompts(tokenizer, {"loud": True}, date(2024, 2, 29))
    if "chat_template_kwargs" not in row:
        prompts.variables = {}
    (question,) = read_questions([str(file)])
    found = prompts.encode(question.prompt)
    # A template may open the answer with what the prompt does not write.
    assert found == ids[: len(found)].tolist() and len(found) <= int(mask.argmax())
    assert tokenizer.decode(found).endswith("<|im_start|>assistant\n")
    shown = tokenizer.decode(found)
    assert ("LOUD2024" in shown) == (row.get("chat_template_kwargs") == {"loud": True})
    assert ("two and two" in shown) == (template is THINKING)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "Once upon a time."}, "format text are no conversations"),
        ({"input_ids": [1, 2]}, "format tokens are no conversations"),
        ({"a": 1}, "cannot tell the format"),
        ([1], "the row is list"),
        ({"messages": PLAIN, "chat_template_kwargs": {"messages": 3}}, "messages, set by the"),
        ({"messages": PLAIN[:3]}, "not an assistant's answer"),
    ],
    ids=["text", "tokens", "unknown", "list", "variables", "no-answer"],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, told):
    for first in ((), ({"messages": PLAIN},)):
        file = write_rows(tmp_path / "rows.jsonl", [*first, row])
        with pytest.raises(DataError) as error:
            read_questions([str(file)])
        assert str(error.value).startswith(f"{file}:{len(first) + 1}: ")
        assert first or told in str(error.value)
