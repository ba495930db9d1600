"""A flag of another program is answered with the one that does the same here."""

import argparse
import re

import pytest
from megatron.training.arguments import add_megatron_arguments

from post_training.arguments.parser import add_finetune_arguments
from post_training.arguments.refused import MegatronFlags
from post_training.recipes.other_names import OTHER_NAMES, hint_for


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def test_answers_name_flags_that_there_are_and_that_are_taken(parser):
    refused = MegatronFlags(parser).refused
    add_finetune_arguments(parser)
    taken = {
        option
        for action in parser._actions
        if action.dest not in refused
        for option in action.option_strings
    }
    for name, answer in OTHER_NAMES.items():
        assert set(re.findall(r"--[a-z][\w-]*", answer)) <= taken, answer
        assert f"--{name.replace('_', '-')}" not in taken, f"--{name} is a flag of its own"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("--learning-rate", "; use --lr"),
        ("--learning_rate", "; use --lr"),
        ("learning_rate", "; use --lr"),
        ("--per-device-train-batch-size", "; use --micro-batch-size"),
        ("--gradient-accumulation-steps", "; use --global-batch-size"),
        ("--use-lora", "; use --lora-rank"),
        ("--train-itres", "; did you mean --train-iters?"),
        ("--train_iters", "; did you mean --train-iters?"),
        ("--zzz", " (finetune.py --help-all lists all)"),
    ],
)
def test_hints(name, told):
    assert hint_for(name, ["--train-iters", "--te-rng-tracker"]).startswith(told)
