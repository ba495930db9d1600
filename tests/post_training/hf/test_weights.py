import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.config import load_hf_config
from post_training.hf.families import model_weights
from post_training.hf.weights import read_parameter, split_parameter, whole_name
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks
from tests.helpers.models import FAMILIES, UNTIED, VOCABULARY, load_model, make_config, make_model

IDS = torch.randint(0, VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def assert_bit_exact(found, folder):
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_exported_tensor_shares_memory(family):
    """Not even where a view is contiguous already: one query group, one head."""
    config = make_config(family, num_key_value_heads=1, num_attention_heads=1)
    config.architectures = [type(make_model(make_config(family))).__name__]
    for name, weight in model_weights(config).items():
        shapes = dict(weight.tensors)
        if weight.expert is not None:
            shapes = {key: shape[1:] for key, shape in shapes.items()}
        one = next(iter(shapes.values()))
        rows = sum(shape[0] for shape in shapes.values())
        value = torch.empty(rows, *one[1:]) if weight.expert is None else torch.empty(one[::-1])
        parts = dict(split_parameter(weight, value))
        assert {key: tuple(part.shape) for key, part in parts.items()} == shapes, name
        found = {part.untyped_storage().data_ptr() for part in parts.values()}
        assert len(found) == len(parts) and value.untyped_storage().data_ptr() not in found, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact_and_logits_agree(hf_model, tmp_path, family, tied):
    if tied and family in UNTIED:
        pytest.skip("transformers does not tie them")
    folder = hf_model(family, tied=tied)
    argv = megatron_model.flags(str(folder), str(tmp_path / "out"))
    state, logits = run_rank(megatron_model.exported_and_logits, argv, IDS)
    assert_bit_exact(state, folder)
    with torch.no_grad():
        expected = load_model(folder)(IDS.unsqueeze(0)).logits[0]
    assert logits.shape == (len(IDS), 512), "padded to a multiple of 128"
    assert expected.std() > 0.4, "logits that say something"
    torch.testing.assert_close(logits[:, :VOCABULARY], expected, rtol=0, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "tied", "layout"),
    [
        ("qwen2", True, TP2),
        ("qwen3_moe", False, PP2),
        ("qwen3_moe", False, TP2),
        pytest.param("qwen2", True, PP2, marks=SLOW),
        *(
            pytest.param(family, False, layout, marks=SLOW)
            for family in ("llama", "mistral", "qwen2", "qwen3")
            for layout in (TP2, PP2)
        ),
    ],
)
def test_each_rank_of_a_layout_reads_its_own_part(hf_model, tmp_path, family, tied, layout):
    """A checkpoint written at that layout gives back the HuggingFace tensors bit by bit."""
    folder, out = hf_model(family, tied=tied), str(tmp_path / "out")
    run_ranks(megatron_model.save, 2, megatron_model.flags(str(folder), out, *layout))
    found = run_rank(
        megatron_model.exported, megatron_model.flags(str(folder), out, "--no-load-optim")
    )
    assert_bit_exact(found, folder)


def test_scaled_rotary_frequencies_matter(hf_model, tmp_path):
    """Llama 3's scaling is part of what the logits are compared on."""
    folder = shutil.copytree(hf_model("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        scaled, plain = (
            load_model(f)(IDS.unsqueeze(0)).logits for f in (hf_model("llama"), folder)
        )
    assert (scaled - plain).abs().max() > 1e-3


def test_sharded_weights_are_read(hf_model, tmp_path):
    folder = tmp_path / "sharded"
    load_model(hf_model("qwen3")).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_model("qwen3") / file, folder)
    argv = megatron_model.flags(str(folder), str(tmp_path / "out"))
    assert_bit_exact(run_rank(megatron_model.exported, argv), hf_model("qwen3"))


def test_wrong_shape_is_refused(hf_model, tmp_path):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "wrong")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-4].contiguous()
    save_file(tensors, folder / "model.safetensors")
    argv = megatron_model.flags(str(folder), str(tmp_path / "out"))
    with pytest.raises(AssertionError, match=rf"SetupError.*{name}.*\(64, 92\).*\(64, 96\)"):
        run_rank(megatron_model.exported, argv)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.2.mlp.linear_fc2.weight", "decoder.layers.6.mlp.linear_fc2.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
            "decoder.layers.4.mlp.experts.local_experts.9.linear_fc1.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc2.weight1",
            "decoder.layers.4.mlp.experts.local_experts.9.linear_fc2.weight",
        ),
        (
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.5.input_layernorm.weight",
        ),
        (
            "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.5.pre_mlp_layernorm.weight",
        ),
    ],
)
def test_names_of_every_implementation_and_layout(name, whole):
    assert whole_name(name, first_layer=4, first_expert=8) == whole


def joined(weight, shards):
    """The whole parameter, as Megatron would hold it on one process."""
    if weight.layout == "replicated":
        return shards[0]
    if weight.layout == "columns":
        return torch.cat(shards, dim=1)
    if weight.layout == "gate_up" or (weight.sections and weight.layout != "qkv"):
        halves = [len(shards[0]) * len(shards) // 2] * 2
        sizes = [size // len(shards) for size in weight.sections or halves]
        parts = zip(*(shard.split(sizes) for shard in shards), strict=True)
        return torch.cat([torch.cat(part) for part in parts])
    return torch.cat(shards)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_ranks_read_is_split_into_the_same_again(hf_model, family, size):
    folder = hf_model(family)
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    padded = torch.Size([512 // size, 64])
    with HFCheckpoint(folder) as checkpoint:
        for weight in model_weights(load_hf_config(str(folder))).values():
            shards = [read_parameter(checkpoint, weight, padded, r, size) for r in range(size)]
            for name, part in split_parameter(weight, joined(weight, shards)):
                if weight.expert is None:
                    found[name] = part
                else:
                    found.setdefault(name, torch.zeros(weight.tensors[name]))[weight.expert] = part
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
