"""Models of `transformers` filled by parts: what `from_pretrained` gives, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from post_training.errors import SetupError
from post_training.hf import causal_lm
from post_training.hf.config import load_hf_config
from tests.helpers.models import edit_json


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gemma3_text", "deepseek_v3", "mamba2", "gpt2", "falcon_h1"]
)
def test_it_is_what_transformers_loads(hf_model, family):
    """Experts that are apart in the files, tied weights, buffers in the files and computed ones."""
    folder = hf_model(family)
    config = AutoConfig.from_pretrained(folder)
    model = causal_lm.build_model(config)
    causal_lm.check_weights(folder, config, model)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    causal_lm.complete(model, config, trust_remote_code=False)
    causal_lm.fill_from_folder(model, folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for mine, theirs in (
        (model.state_dict(), expected.state_dict()),
        (dict(model.named_buffers()), dict(expected.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    tied = len(list(expected.parameters()))
    assert len(list(model.parameters())) == tied


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("model.norm.weight"), "lack the tensor model.norm.weight"),
        (lambda s: s.update({"model.norm.bias": torch.ones(64)}), "no place for: model.norm.bias"),
        (lambda s: s.update({"model.norm.weight": torch.ones(65)}), r"has shape \[65\], config"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            "is F8_E4M3; only",
        ),
    ],
)
def test_other_weights_are_refused(hf_model, tmp_path, change, told):
    folder = hf_model("olmo2")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(SetupError, match=told):
        causal_lm.check_weights(tmp_path, config, causal_lm.build_model(config))


def test_what_is_no_causal_language_model_is_refused(hf_model, tmp_path):
    config = AutoConfig.from_pretrained(hf_model("olmo2"))
    config.save_pretrained(tmp_path)
    for architectures in (["BertForMaskedLM"], ["Olmo2Model"], []):
        edit_json(tmp_path / "config.json", architectures=architectures)
        with pytest.raises(SetupError, match="no causal language model"):
            load_hf_config(str(tmp_path), backend="transformers")
