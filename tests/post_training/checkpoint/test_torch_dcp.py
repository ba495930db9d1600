import json
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from post_training.checkpoint.store import Checkpoint
from post_training.checkpoint.torch_dcp import check_format, checkpoint_format, load_weights
from post_training.errors import SetupError

LAYER = "decoder.layers.0."
# Local names and those of Transformer Engine's layers.
NAMES = {
    "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    LAYER + "input_layernorm.weight": LAYER + "self_attention.linear_qkv.layer_norm_weight",
    LAYER + "mlp.experts.local_experts.1.linear_fc1.weight": LAYER
    + "mlp.experts.linear_fc1.weight1",
    "a.model.of.its.own": "a.model.of.its.own",
}


def make_model(names):
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name in names:
        *path, last = name.split(".")
        module: Any = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(3)))
    return root


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that a run with Transformer Engine has written; returns it and its values."""
    values = {name: torch.randn(3) for name in NAMES.values()}
    state = {"model": {**values, LAYER + "mlp._extra_state": None}, "iteration": 3}
    dcp.save(state, checkpoint_id=str(tmp_path / "iter_0000003"), no_dist=True)
    return Checkpoint.at(tmp_path / "iter_0000003"), values


@pytest.mark.parametrize("names", [NAMES.keys(), NAMES.values()], ids=["local", "te"])
def test_weights_are_found_by_either_name(checkpoint, names):
    folder, values = checkpoint
    model = make_model(names)
    load_weights(model, folder)
    for local, other in NAMES.items():
        name = local if local in names else other
        assert model.get_parameter(name).equal(values[other])


def test_dtype_of_the_model_stays(checkpoint):
    folder, values = checkpoint
    model = make_model(NAMES).bfloat16()
    load_weights(model, folder)
    expected = values["a.model.of.its.own"].bfloat16()
    assert model.get_parameter("a.model.of.its.own").equal(expected)


def test_missing_parameter_is_named(checkpoint):
    model = make_model([*NAMES, "decoder.final_layernorm.weight"])
    with pytest.raises(SetupError, match="lacks the parameter decoder.final_layernorm.weight"):
        load_weights(model, checkpoint[0])


def test_formats_are_told_apart(checkpoint, tmp_path):
    assert checkpoint_format(checkpoint[0]) == "torch_dcp"
    other = tmp_path / "iter_0000001"
    other.mkdir()
    (other / ".metadata").write_bytes(b"")
    (other / "metadata.json").write_text("{}")
    assert checkpoint_format(Checkpoint.at(other)) == "torch_dist"
    # The manifest comes first.
    manifest = {"files": {}, "origin": {"ckpt_format": "torch_dcp"}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_format(Checkpoint.at(other)) == "torch_dcp"


def test_another_implementation_of_the_layers_is_refused(checkpoint):
    """The optimizer's state goes by the order of parameters, which differs."""
    args = Namespace(use_torch_fsdp2=True, skip_train=False, transformer_impl="local")
    check_format(args, checkpoint[0], {})
    check_format(args, checkpoint[0], {"transformer_impl": "local"})
    with pytest.raises(SetupError, match="--transformer-impl transformer_engine, here it is local"):
        check_format(args, checkpoint[0], {"transformer_impl": "transformer_engine"})
    args.skip_train = True
    check_format(args, checkpoint[0], {"transformer_impl": "transformer_engine"})


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({}, r"export_hf\.py, and give that folder as --hf-model"),
        ({"lora": {}}, r"export_hf\.py --adapter, and give that folder as --lora-adapter"),
    ],
)
def test_the_way_out_of_a_format_keeps_what_is_trained(checkpoint, origin, told):
    file = checkpoint[0].path / "manifest.json"
    origin["ckpt_format"] = "torch_dcp"
    file.write_text(json.dumps({"files": {}, "origin": origin}))
    args = Namespace(use_torch_fsdp2=False, skip_train=False, transformer_impl="local")
    with pytest.raises(SetupError, match=told):
        check_format(args, Checkpoint.at(checkpoint[0].path), {})
