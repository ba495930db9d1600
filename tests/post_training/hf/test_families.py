"""The table of architectures says of each what `transformers` says, of every tensor."""

import pytest
from safetensors.torch import load_file

from post_training.arguments.completion import validate
from post_training.arguments.parser import parse_arguments
from post_training.hf.check import expected_tensors
from post_training.hf.config import load_hf_config, megatron_flags
from post_training.hf.families import FAMILIES, model_weights
from tests.helpers import models

VARIANTS = [
    *((family, {}) for family in models.FAMILIES),
    *((family, {"tied": True}) for family in models.FAMILIES if family not in models.UNTIED),
    ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0], "decoder_sparse_step": 2}),
    ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0, 1]}),
]


def test_each_entry_has_a_tiny_model_to_be_compared_with(hf_model):
    named = {load_hf_config(str(hf_model(family))).architectures[0] for family in models.FAMILIES}
    assert named == set(FAMILIES)


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_names_and_shapes_are_those_of_transformers(hf_model, family, options):
    """All of them, and each belongs to one parameter."""
    folder = hf_model(family, **options)
    config = load_hf_config(str(folder))
    saved = load_file(folder / "model.safetensors")
    assert expected_tensors(config) == {n: tuple(tensor.shape) for n, tensor in saved.items()}
    weights = model_weights(config).values()
    named = [(name, weight.expert) for weight in weights for name in weight.tensors]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_flags_are_taken_by_the_parser_and_by_megatron(
    hf_model, tmp_path, monkeypatch, family, options
):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder = str(hf_model(family, **options))
    flags = megatron_flags(load_hf_config(folder))
    words = ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "1"]
    args = parse_arguments([*words, "--seq-length", "64", "--global-batch-size", "1"])
    assert {name: getattr(args, name) for name in flags} == flags
    validate(args)
