"""Which model the tools take, and which flags contradict each other."""

import pytest

from model_provider import model_config
from post_training.arguments.backend import MODEL_BACKENDS
from post_training.errors import SetupError
from post_training.inference.backends import (
    answering_parser,
    open_backend,
)


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "give --output-dir (a run) or --hf-model"),
        ("--output-dir run --hf-model folder", "--output-dir run and --hf-model folder: give one"),
        ("--hf-model folder --iteration 3", "--iteration 3: --hf-model folder is no run"),
        ("--hf-model folder --batch-size 0", "--batch-size 0: must be at least 1"),
    ],
)
def test_flags_that_name_no_model_or_several_are_refused(backend, flags, told):
    with pytest.raises(SetupError) as caught:
        open_backend(
            answering_parser(None).parse_args(["--model-backend", backend, *flags.split()]),
            model_config,
        )
    assert str(caught.value).startswith(told)


def test_a_run_is_exported_before_transformers_reads_it():
    flags = "--backend transformers --output-dir run --iteration 3"
    with pytest.raises(SetupError, match=r"export_hf.py --output-dir run, and give\s--hf-model"):
        open_backend(answering_parser(None).parse_args(flags.split()), model_config)
