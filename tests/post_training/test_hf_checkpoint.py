"""What a HuggingFace folder may hold, and what is refused before a run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.errors import SetupError
from post_training.hf_checkpoint import HFCheckpoint, check_hf_weights
from post_training.hf_config import load_hf_config
from tests.helpers.models import FAMILIES, edit_json, load_model


def test_a_slice_is_read_without_the_rest(hf_model):
    name = "model.layers.0.mlp.up_proj.weight"
    with HFCheckpoint(hf_model("qwen3")) as checkpoint:
        part = checkpoint.slice(name)[4:8]
        assert name in checkpoint and "model.layers.7.mlp.up_proj.weight" not in checkpoint
    assert torch.equal(part, load_file(hf_model("qwen3") / "model.safetensors")[name][4:8])


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SetupError, match=r"safetensors.*found pytorch_model\.bin"):
        HFCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(SetupError, match="found no weights"):
        HFCheckpoint(tmp_path)


def test_missing_shard(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(SetupError, match=r"missing weight files model-2\.safetensors$"):
        HFCheckpoint(tmp_path)


@pytest.fixture
def folder_with(hf_model, tmp_path):
    """A copy of a tiny model's folder whose tensors are changed."""

    def make(change, family="qwen3", *, tied=False):
        folder = shutil.copytree(hf_model(family, tied=tied), tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def check(folder):
    check_hf_weights(folder, load_hf_config(str(folder)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_is_taken(hf_model, tmp_path, family, tied, dtype):
    folder = tmp_path / "sharded"
    model = load_model(hf_model(family, tied=tied)).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    check(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_weights_of_another_dtype_are_refused(folder_with, dtype):
    """Quantised ones are numbers that mean nothing without their scales."""
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)

    shown = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "float64": "F64"}
    with pytest.raises(SetupError) as error:
        check(folder_with(change))
    expected = rf": {name} is {shown[str(dtype).removeprefix('torch.')]}; only fp32, bf16 and fp16"
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.bias",  # a Qwen2's
        "model.layers.2.mlp.up_proj.weight",  # one layer more than config.json has
        "model.mtp.0.eh_proj.weight",
        "lm_head.bias",
    ],
)
def test_tensors_that_would_be_left_out_are_refused(folder_with, name):
    folder = folder_with(lambda tensors: tensors.update({name: torch.zeros(4)}))
    with pytest.raises(SetupError) as error:
        check(folder)
    assert f"1 tensor that a Qwen3ForCausalLM of 2 layers has no place for: {name}" in str(
        error.value
    )


def test_leftovers_of_a_shard_that_the_index_does_not_name(hf_model, tmp_path):
    """`transformers` reads whole files, so an index that leaves names out hides nothing."""
    folder = tmp_path / "sharded"
    load_model(hf_model("qwen3")).save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    extra = {f"model.layers.{n}.extra": torch.zeros(1) for n in range(5)}
    save_file(load_file(shard) | extra, shard)
    with pytest.raises(
        SetupError, match=r"5 tensors .*0\.extra, .*1\.extra, .*2\.extra and 2 more"
    ):
        check(folder)


@pytest.mark.parametrize("buffer", ["inv_freq", "cos_cached", "sin_cached"])
def test_what_is_computed_anyway_is_passed_over(folder_with, buffer):
    """Llama checkpoints of old hold the rotary embedding's buffers."""
    name = f"model.layers.0.self_attn.rotary_emb.{buffer}"
    check(folder_with(lambda tensors: tensors.update({name: torch.zeros(8)}), "llama"))


def test_a_tied_models_own_head(folder_with):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = folder_with(change, tied=True)
    check(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SetupError, match=r"lm_head\.weight is not .*tie_word_embeddings false"):
        check(folder)


def test_a_file_that_was_cut_short(hf_model, tmp_path):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SetupError, match="weight files are damaged"):
        check(folder)


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization_config", {"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ("quantization_config", {"load_in_8bit": True}, "method not named"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_models_configuration_is_refused(hf_model, tmp_path, key, value, method):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "quantised")
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(SetupError) as error:
        load_hf_config(str(folder))
    assert f"config.json has {key} ({method})" in str(error.value)
    assert "bf16 weights" in str(error.value)
