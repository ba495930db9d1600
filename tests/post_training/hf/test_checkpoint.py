"""Weight files are read by parts, and refused where they are not whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.errors import SetupError
from post_training.hf.checkpoint import HFCheckpoint


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


@pytest.mark.parametrize(
    "index",
    ["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": null}}', "{", "\xff"],
)
def test_an_index_that_maps_nothing(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(SetupError, match=r"model\.safetensors\.index\.json"):
        HFCheckpoint(tmp_path)


def test_a_file_that_was_cut_short(hf_model, tmp_path):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SetupError, match="weight files are damaged"):
        HFCheckpoint(folder)
