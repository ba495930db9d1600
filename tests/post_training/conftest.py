# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported
"""Puts the platform layer in place before a test module imports Megatron; parses flags as a run does."""

import os

import pytest

from post_training import platform

_before = dict(os.environ)
platform.apply()
# It made this process rank 0 of 1; processes that tests start must not inherit that.
for _name in os.environ.keys() - _before.keys():
    del os.environ[_name]

from data import prepare_documents
from tests.helpers.models import make_tokenizer
from tests.helpers.positions import SEQ, make_checkpoint, position_of


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    from post_training.arguments.parser import parse_arguments

    def parse(*flags, out="out"):
        words = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / out)]
        return parse_arguments([*words, "--train-iters", "9", "--global-batch-size", "4", *flags])

    return parse


@pytest.fixture(scope="module")
def documents(chat_data):
    return prepare_documents(
        files=[str(chat_data.file)],
        tokenizer=make_tokenizer(),
        seq_length=192,
        cache_dir=None,
        on_bad_row="error",
    )


@pytest.fixture(scope="module")
def other_documents(chat_data, tmp_path_factory):
    lines = chat_data.file.read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("other") / "train.jsonl"
    file.write_text("".join(lines[:-1]))
    return prepare_documents(
        files=[str(file)],
        tokenizer=make_tokenizer(),
        seq_length=192,
        cache_dir=None,
        on_bad_row="error",
    )


@pytest.fixture
def saved(parse, documents, tmp_path):
    """Saves what a run of these flags has consumed, and gives the checkpoint."""

    def save(consumed, *flags, out="out", iteration=5, of=documents, **more):
        args = parse(*SEQ, *flags, out=out)
        position = position_of(args, of)
        args.consumed_train_samples = consumed
        args.virtual_pipeline_model_parallel_size = None
        facts = position.facts() | more
        return make_checkpoint(tmp_path / out / "checkpoints", iteration, facts)

    return save
