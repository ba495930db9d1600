"""What weights a HuggingFace folder may hold, and what is refused before a run."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.errors import SetupError
from post_training.hf.check import check_hf_weights
from post_training.hf.config import load_hf_config
from tests.helpers.models import FAMILIES, UNTIED, edit_json, load_model


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
    if tied and family in UNTIED:
        pytest.skip("transformers does not tie them")
    folder = tmp_path / "sharded"
    model = load_model(hf_model(family, tied=tied)).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    check(folder)


def test_layers_of_multi_token_prediction_are_passed_over(folder_with):
    """As by transformers; others behind the last are not."""
    more = {"model.layers.2.eh_proj.weight": torch.zeros(4, 8)}
    folder = folder_with(lambda tensors: tensors.update(more), "deepseek_v3")
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    check(folder)
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(SetupError, match="no place for: model.layers.2.eh_proj.weight"):
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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("seed_oss", "model.layers.0.self_attn.v_proj.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(folder_with, family, name):
    """Whichever it is."""
    shapes = []

    def change(tensors):
        tensors[name] = tensors[name][..., :-1].contiguous()
        shapes.append(list(tensors[name].shape))

    with pytest.raises(SetupError) as error:
        check(folder_with(change, family))
    expected = [*shapes[0][:-1], shapes[0][-1] + 1]
    assert f"{name} has shape {shapes[0]}, config.json says {expected}" in str(error.value)
