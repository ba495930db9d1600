"""Which matrices of a `transformers` model a word means: no router, no tower that nobody named."""

import pytest

from post_training.adapters.settings import LoraSettings, chosen_targets, every_target, short_names
from tests.helpers import vision
from tests.helpers.architectures import tiny
from tests.helpers.models import make_config

LANGUAGE = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@pytest.mark.parametrize(
    ("words", "expected", "sees"),
    [
        ("all", LANGUAGE, False),
        ("gate_proj down_proj", "gate_proj down_proj", False),
        (r".*(gate|up)_proj", "gate_proj up_proj", False),
        ("vision", "qkv proj gate_proj up_proj down_proj 0 2", True),
        ("qkv", "qkv", True),
        ("visual.blocks.0.mlp.gate_proj", "gate_proj", True),
        (r".*\.visual\..*_proj", "gate_proj up_proj down_proj", True),
        (r".*\.merger\.mlp\..", "0 2", True),
        ("all vision", f"qkv proj {LANGUAGE} 0 2", None),
    ],
)
def test_a_tower_is_asked_for(words, expected, sees):
    targets = words if "*" in words else tuple(words.split())
    config = vision.make_model("qwen2_5_vl").config
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    chosen = chosen_targets(config, LoraSettings(4, 8.0, targets, backend="transformers"))
    assert {name.rpartition(".")[2] for name in chosen} == set(expected.split())
    # As it is stored, PEFT must not find blocks that have a number for a name.
    stored = short_names(every_target(config, "transformers"), chosen)
    assert not any(name.isdigit() for name in stored)
    assert {"visual" in name for name in chosen} == ({True, False} if sees is None else {sees})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make_config("qwen3_moe"), "q_proj k_proj v_proj o_proj gate_up_proj down_proj"),
        (tiny("gpt_oss"), "q_proj k_proj v_proj o_proj gate_up_proj down_proj"),
        (tiny("gpt2"), "c_attn c_proj c_fc"),
        (tiny("mamba2"), "in_proj"),
    ],
    ids=lambda each: getattr(each, "model_type", None),
)
def test_all_are_matrices_that_are_called(config, expected):
    chosen = chosen_targets(config, LoraSettings(4, 8.0, ("all",), backend="transformers"))
    assert {name.rpartition(".")[2] for name in chosen} == set(expected.split())
