"""Factors in models of `transformers`: stored as `peft` reads them, read again, merged."""

import json

import pytest
import torch

from post_training.adapters.injected import (
    factors_of,
    fill_factors,
    inject,
    merge_factors,
    round_to_nf4,
)
from post_training.adapters.layers import save_factors_only
from post_training.adapters.peft_config import CONFIG
from post_training.adapters.peft_folder import read_settings, write_adapter
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.errors import SetupError
from post_training.hf.causal_lm import build_model, complete, fill_from_folder
from tests.helpers import plain_lora
from tests.helpers.models import load_model

pytestmark = pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")
IDS = torch.arange(3, 40).unsqueeze(0)


def settings(*targets, **more):
    return LoraSettings(4, 8.0, targets or ("all",), backend="transformers", **more)


def adapted(folder, own, seed=1):
    """The model of a folder, with factors that are not 0."""
    config = load_model(folder).config
    model = build_model(config)
    inject(model, config, own, 0.0)
    complete(model.to_empty(device="cpu"), config, trust_remote_code=False)
    fill_from_folder(model, folder)
    fill_factors(model, config, own, seed, None)
    with torch.no_grad():
        for factor in factors_of(model).values():
            factor.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(2)) / 20)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("qwen3_moe", settings("all", "lm_head")),
        ("qwen3", settings("all", "embed_tokens", nf4=True)),
        ("deepseek_v3", settings("all", rslora=True)),
        ("deepseek_v3", settings("0.mlp.gate_proj", "0.mlp.down_proj")),
        ("qwen2_moe", settings("mlp")),
        ("gpt2", settings(rslora=True)),
    ],
)
def test_stored_read_and_merged_it_computes_the_same(hf_model, tmp_path, family, own):
    from peft import PeftModel

    folder = hf_model(family)
    model, base = adapted(folder, own), load_model(folder)
    config, expected = base.config, logits(model)
    if own.nf4:
        round_to_nf4(base, config)
    assert (expected - logits(base)).abs().max() > 0.05
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(factors_of(model)) > 0
    targets = chosen_targets(config, own)
    write_adapter(
        tmp_path, config, own, factors_of(model), targets, dropout=0.0, base="B", digest="D"
    )
    again = read_settings(tmp_path, config, folder, backend="transformers", nf4=own.nf4)
    assert chosen_targets(config, again) == targets
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.allclose(logits(theirs), expected, atol=1e-6)
    merge_factors(model)
    assert not factors_of(model) and torch.allclose(logits(model), expected, atol=1e-5)

    refilled = adapted(folder, own, seed=3)
    fill_factors(refilled, config, again, 0, str(tmp_path))
    assert torch.equal(logits(refilled), expected)
    found = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(found | {"r": 5}))
    with pytest.raises(SetupError, match="another base or rank"):
        read_settings(tmp_path, config, folder, backend="transformers")


def test_a_state_holds_factors_only_and_all_of_them(hf_model):
    model = torch.nn.Module()
    model.model = adapted(hf_model("llama"), settings("q_proj"))
    save_factors_only(model)
    state = model.state_dict()
    assert len(state) == 4 and all(".lora_" in name for name in state)
    model.load_state_dict(state)
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
