"""A small tokenizer with ChatML tokens, trained here, so that most tests need no files."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = """The quick brown fox jumps over the lazy dog. What is two plus two? It is four.
Why does the sky look blue? Because air scatters blue light more than red light.
def add(a, b):\n    return a + b\n
{"name": "search", "arguments": {"query": "weather in Paris"}} <think>\nLet me see.\n</think>
"""


@pytest.fixture(scope="session")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def make_rows(count, seed=0):
    """Question/answer rows of varied length."""
    words = TEXT.split()
    rows = []
    for number in range(count):
        size = 3 + (number * 7919 + seed) % 23
        answer = " ".join(words[(number + i) % len(words)] for i in range(size))
        rows.append({"question": f"Question {number}: why?", "answer": answer})
    return rows


@pytest.fixture(scope="session")
def rows():
    return make_rows(200)
