"""An export that would compute something else is refused, in bf16 too."""

import functools
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from post_training.errors import SetupError
from post_training.export.hf import _cast
from tests.helpers.launch import run_rank


@pytest.fixture(scope="module")
def bf16(hf_model, tmp_path_factory):
    """Models in bf16. With experts the router takes others there than Megatron's, of the same weights."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        source = hf_model(family)
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return make


def export(folder: str, target: str, theta: float) -> tuple[float | str, bool]:
    """Export a HuggingFace folder; the rotary base in its new configuration is `theta` times the old one.

    Returns:
        The difference, or why it is refused; and whether the Megatron model is still in memory.
    """
    from model_provider import model_config
    from post_training.export.hf import export_hf
    from post_training.inference.load import load_model

    loaded = load_model(model_config, hf_model=folder)
    chunks, loaded.model = [loaded.model], None
    model = weakref.ref(chunks[0])
    config = loaded.args.hf_config
    assert next(chunks[0].parameters()).dtype == config.dtype
    config.rope_parameters["rope_theta"] *= theta
    result: float | str
    try:
        result = export_hf(chunks, config, loaded.tokenizer, target, hf_model=folder)
    except SetupError as error:
        result = str(error)
    return result, model() is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "seed_oss", "smollm3"])
def test_the_same_model_in_bf16(bf16, tmp_path, family):
    target = tmp_path / "hf"
    difference, kept = run_rank(export, str(bf16(family)), str(target), 1.0)
    assert difference < 1e-5 and not kept
    before, after = (load_file(where / "model.safetensors") for where in (bf16(family), target))
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


@pytest.mark.slow
def test_another_rotary_base_is_refused(bf16, tmp_path):
    message, _ = run_rank(export, str(bf16("qwen3_moe")), str(tmp_path / "hf"), 1.01)
    assert "logits differ from the run's" in message and "(allowed 1e-05)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf.partial"]
    assert (tmp_path / "hf.partial" / "config.json").is_file()


def test_a_weight_too_large_for_the_dtype_is_named():
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(7e4)
    with pytest.raises(SetupError, match=r"--dtype: weight holds 7e\+04, more than torch.float16"):
        _cast(model, torch.float16)
    _cast(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
