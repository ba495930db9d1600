"""An export that would compute something else is refused, in bf16 too."""

import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.launch import run_rank


@pytest.fixture(scope="module")
def folder(hf_model, tmp_path_factory):
    """A bf16 model with experts: in bf16 its router takes others than Megatron's, of the same weights."""
    folder = tmp_path_factory.mktemp("bf16")
    source = hf_model("qwen3_moe")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def export(folder: str, target: str, theta: float) -> tuple[float | str, bool]:
    """Export a HuggingFace folder; the rotary base in its new configuration is `theta` times the old one.

    Returns:
        The difference, or why it is refused; and whether the Megatron model is still in memory.
    """
    from post_training.errors import SetupError
    from post_training.hf_export import export_hf
    from post_training.inference import load_model

    loaded = load_model(hf_model=folder)
    model = weakref.ref(loaded.model)
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    loaded.args.hf_config.rope_parameters["rope_theta"] *= theta
    result: float | str
    try:
        result = export_hf(loaded, target)
    except SetupError as error:
        result = str(error)
    return result, model() is not None


@pytest.mark.slow
def test_the_same_model_in_bf16(folder, tmp_path):
    target = tmp_path / "hf"
    difference, kept = run_rank(export, str(folder), str(target), 1.0)
    assert difference < 1e-5 and not kept
    before, after = (load_file(where / "model.safetensors") for where in (folder, target))
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


@pytest.mark.slow
def test_another_rotary_base_is_refused(folder, tmp_path):
    message, _ = run_rank(export, str(folder), str(tmp_path / "hf"), 1.01)
    assert "logits differ from Megatron's" in message and "(allowed 1e-05)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf.partial"]
    assert (tmp_path / "hf.partial" / "config.json").is_file()
