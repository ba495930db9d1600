"""Adapters as PEFT stores them: written, read again, and what is no plain LoRA of this base is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.adapters.layers import new_factors
from post_training.adapters.peft_folder import (
    CONFIG,
    WEIGHTS,
    base_of,
    read_factors,
    read_settings,
    write_adapter,
)
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.errors import SetupError
from tests.helpers.models import make_config

MODEL = make_config("qwen3", architectures=["Qwen3ForCausalLM"])
SETTINGS = LoraSettings(4, 8.0, ("v_proj", "q_proj", "embed_tokens"), rank_pattern={"v_proj": 3})

BASE = Path("nowhere")


@pytest.fixture
def folder(tmp_path):
    targets = chosen_targets(MODEL, SETTINGS)
    factors: dict[str, torch.Tensor] = {}
    for target in targets.values():
        factors |= dict(zip(target.keys, new_factors(target, 1), strict=True))
    write_adapter(tmp_path, MODEL, SETTINGS, factors, targets, dropout=0.1, base="B", digest="D")
    return tmp_path


def test_written_and_read_again(folder):
    found = read_settings(folder, MODEL, BASE)
    targets = chosen_targets(MODEL, SETTINGS)
    assert chosen_targets(MODEL, found) == targets and base_of(folder) == "D"
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == [
        "embed_tokens",
        "q_proj",
        "v_proj",
    ]
    target = targets["model.layers.1.self_attn.v_proj"]
    for one, other in zip(read_factors(folder, target), new_factors(target, 1), strict=True):
        assert torch.equal(one, other)
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias is all"),
        ({"modules_to_save": ["lm_head"]}, "trained as a whole"),
        ({"target_parameters": ["experts.down_proj"]}, "fused parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 5}, "another base or rank"),
        ({"r": "many"}, "cannot be used"),
        ({"lora_alpha": None}, "cannot be used"),
    ],
)
def test_another_kind_is_refused(folder, changes, message):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SetupError, match=message):
        read_settings(folder, MODEL, BASE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 32}, "another base or rank"),
        ({"num_hidden_layers": 1}, "no place for model.layers.1"),
    ],
)
def test_another_base_is_refused(folder, config, message):
    other = make_config("qwen3", architectures=["Qwen3ForCausalLM"], **config)
    with pytest.raises(SetupError, match=message):
        read_settings(folder, other, BASE)


def test_tensors_that_mean_something_else_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file(tensors | {name: torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(SetupError, match="lora_magnitude_vector"):
        read_settings(folder, MODEL, BASE)
    (folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(SetupError, match="damaged"):
        read_settings(folder, MODEL, BASE)


def test_a_stored_embedding_is_the_bases_own(folder, hf_model):
    """PEFT stores it beside its factors; trained or made larger it would be lost."""
    base = hf_model("qwen3")
    tensors = load_file(folder / WEIGHTS)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {key: own}, folder / WEIGHTS)
    assert read_settings(folder, MODEL, base).rank == 4
    for other in (own + 1, torch.cat([own, own[:1]])):
        save_file(tensors | {key: other}, folder / WEIGHTS)
        with pytest.raises(SetupError, match="another base's"):
            read_settings(folder, MODEL, base)
