"""Which model the tools take, and which flags contradict each other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_provider import model_config
from post_training.adapters.layers import new_factors
from post_training.adapters.peft_config import CONFIG, WEIGHTS
from post_training.adapters.peft_folder import write_adapter
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.arguments.backend import MODEL_BACKENDS
from post_training.errors import SetupError
from post_training.hf.config import load_hf_config
from post_training.hf.folder import TOKENIZER_FILES, copy_files, weights_digest
from post_training.inference.backends import (
    TransformersBackend,
    answering_parser,
    open_backend,
)
from post_training.inference.generate import Sampling
from tests.helpers import plain_lora


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


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize(
    ("said", "stored", "told"),
    [
        ({}, {}, None),
        ({"base_model_name_or_path": None}, {}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, {}, "/nowhere is not there"),
        ({"base_model_name_or_path": "another"}, {}, "was trained on other weights"),
        ({"target_modules": ["q_proj", "k_proj"]}, {}, "look at .*layers.0.*k_proj.lora_A"),
        ({"r": 5}, {}, "look at .*layers.0.*q_proj.lora_A"),
        ({}, {QUERY: None}, "look at .*layers.0.*q_proj.lora_B"),
        ({}, {QUERY.replace(".0.", ".9."): torch.ones(128, 4)}, "look at .*layers.9"),
        ({}, {QUERY: torch.full((128, 4), float("nan"))}, "holds NaN or infinity"),
    ],
)
def test_an_adapter_answers_whole_and_on_its_own_base(hf_model, tmp_path, said, stored, told):
    """`transformers` begins anew what is missing and leaves out what is too much, with a warning."""
    base, config = hf_model("qwen3"), load_hf_config(str(hf_model("qwen3")))
    settings = LoraSettings(4, 8.0, ("q_proj",))
    targets = chosen_targets(config, settings)
    factors = {
        key: value
        for target in targets.values()
        for key, value in zip(target.keys, new_factors(target, 1), strict=True)
    }
    digest = weights_digest(base)
    write_adapter(
        tmp_path, config, settings, factors, targets, dropout=0.0, base=str(base), digest=digest
    )
    copy_files(base, tmp_path, TOKENIZER_FILES)
    if said.get("base_model_name_or_path") == "another":
        said = {"base_model_name_or_path": str(hf_model("qwen3", tied=True))}
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | said))
    tensors = load_file(tmp_path / WEIGHTS) | stored
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / WEIGHTS, {"base_weights": digest})
    if told is None:
        assert TransformersBackend.load(str(tmp_path), Sampling(), 1).generate([[1, 2, 3]])
        return
    with pytest.raises(SetupError, match=told):
        TransformersBackend.load(str(tmp_path), Sampling(), 1)


def test_a_model_of_which_a_weight_is_missing_does_not_answer(hf_model, tmp_path):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match=r"look at model.layers.1.mlp.up_proj.weight"):
        TransformersBackend.load(str(folder), Sampling(), 1)
