"""Templates by name: the tokenizer's own where it is of the family, else the family's plain form."""

import copy

import jinja2
import pytest

from data import DataError
from data.templates.tokenizer_facts import template_source
from tests.helpers.models import make_tokenizer


def test_names():
    tokenizer = make_tokenizer()
    own = tokenizer.chat_template
    assert "<|im_start|>" in own
    for name in ("native", "qwen2_5", "qwen3", None):
        assert template_source(tokenizer, name) == own
    with pytest.raises(DataError, match=r"llama3: .* does not write <\|start_header_id\|>"):
        template_source(tokenizer, "llama3")
    with pytest.raises(DataError, match="no such file.*others are native, chatml"):
        template_source(tokenizer, "llama9")
    tokenizer = copy.deepcopy(tokenizer)  # which other tests share
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        template_source(tokenizer, "native")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, text in {
        "chatml": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        "qwen3": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    }.items():
        made = jinja2.Template(template_source(tokenizer, name), keep_trailing_newline=True)
        assert made.render(messages=messages, bos_token="<s>") == text
