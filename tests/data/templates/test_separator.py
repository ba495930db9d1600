import copy

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.errors import DataError
from data.templates.separator import choose_separator
from tests.data.conftest import CHATML


def choose(tokenizer, choice="auto", template=CHATML, rendered=""):
    found = choose_separator(tokenizer, choice, template, rendered)
    return None if found is None else tokenizer.convert_ids_to_tokens(found)


def test_pad_token_of_its_own_is_chosen(tokenizer):
    assert choose(tokenizer) == "<|endoftext|>"
    assert choose(tokenizer, "none") is None
    assert choose(tokenizer, "<|endoftext|>") == "<|endoftext|>"


def test_token_that_conversations_contain_is_never_chosen(tokenizer):
    assert choose(tokenizer, rendered="... <|endoftext|>") is None
    assert choose(tokenizer, template=CHATML + "<|endoftext|>") is None
    ended = copy.deepcopy(tokenizer)  # a shallow copy shares the map of special tokens
    ended.eos_token = "<|endoftext|>"
    assert choose(ended) is None


@pytest.mark.parametrize("more", [[], ["<|reserved_special_token_0|>"]])
def test_end_of_text_is_the_placeholder_of_llama_3_where_it_has_no_other(tokenizer, more):
    llama = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()),
        eos_token="<|eot_id|>",
        extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>", *more],
    )
    assert choose(llama, template="<|begin_of_text|><|eot_id|>") == "<|end_of_text|>"


@pytest.mark.parametrize("choice", ["<|im_end|>", "word"])
def test_conflicting_choice_is_an_error(tokenizer, choice):
    with pytest.raises(DataError, match="--separator"):
        choose(tokenizer, choice)


@pytest.mark.parametrize(
    ("name", "separator"),
    [("qwen3", "<|endoftext|>"), ("minimind", "<|endoftext|>"), ("mistral-7b-instruct", "<unk>"),
     ("phi-3-mini", "<unk>")],
)  # fmt: skip
def test_families_have_their_placeholder(test_data, name, separator):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / name)
    from data.prepare.options import PrepareOptions, tokenize_options

    chosen = tokenize_options(tokenizer, PrepareOptions(seq_length=64))[0].separator
    assert tokenizer.convert_ids_to_tokens(chosen) == separator
