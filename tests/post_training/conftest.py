"""Puts the platform layer in place before a test module imports Megatron; parses flags as a run does."""

import os

import pytest

from post_training import platform

_before = dict(os.environ)
platform.apply()
# It made this process rank 0 of 1; processes that tests start must not inherit that.
for _name in os.environ.keys() - _before.keys():
    del os.environ[_name]


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    from post_training.arguments import parse_arguments

    def parse(*flags, out="out"):
        words = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / out)]
        return parse_arguments([*words, "--train-iters", "9", "--global-batch-size", "4", *flags])

    return parse
