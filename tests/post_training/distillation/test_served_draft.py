"""An exported draft as a server reads it: what it must hold, and that its keys are those of a sequence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.distillation.served_draft import WEIGHTS, ServedDraft
from post_training.distillation.speculation import Acceptance, Verifier
from post_training.errors import SetupError
from post_training.hf.draft import DraftShape, draft_config
from tests.helpers.models import VOCABULARY, load_model, make_config

DRAFTED = 64


@pytest.fixture
def folder(tmp_path):
    config = make_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    shape = DraftShape.of(config, DRAFTED)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator) * 0.1
        for weight in shape.weights().values()
        for name, size in weight.tensors.items()
    }
    tokens = torch.arange(DRAFTED) * 3
    known = torch.zeros(VOCABULARY, dtype=torch.bool)
    known[tokens] = True
    tensors |= {"d2t": tokens - torch.arange(DRAFTED), "t2d": known}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(
        json.dumps(draft_config(config, shape, (-1, 0, 1), "float32"))
    )
    return tmp_path


@pytest.fixture
def embedding():
    return torch.randn(VOCABULARY, 64, generator=torch.Generator().manual_seed(1))


def test_queries_may_come_together_or_one_by_one(folder, embedding):
    """And what was drafted in between leaves nothing behind."""
    draft = ServedDraft(folder, embedding)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (9,), generator=generator)
    aux = torch.randn(9, 3 * 64, generator=generator)
    whole = draft.draft(tokens, aux, 4)
    assert (whole % 3 == 0).all() and len(whole) == 4  # of the draft's own vocabulary
    # What is kept tells more than the drafted tokens, which a random draft repeats.
    keys, values = draft._keys, draft._values
    draft.restart()
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        last = draft.draft(tokens[begin:end], aux[begin:end], 4)
    assert torch.equal(last, whole)
    torch.testing.assert_close((draft._keys, draft._values), (keys, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight has shape None"),
        (lambda t: t.pop("d2t"), "d2t has shape None"),
        (lambda t: t.update(surplus=torch.ones(1)), "surplus"),
        (lambda t: t.update(d2t=t["d2t"] + torch.arange(DRAFTED)), "d2t and t2d"),
        (lambda t: t.update({"lm_head.weight": torch.ones(DRAFTED, 32)}), "lm_head.weight"),
    ],
)
def test_a_folder_that_a_server_would_guess_about_is_refused(folder, embedding, change, message):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(SetupError, match=message):
        ServedDraft(folder, embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}, "not 3 ascending numbers"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, "not 3 ascending numbers"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, "counts layers twice"),
        ({"eagle_config": None}, "counts layers twice"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type yarn"),
        ({"rope_scaling": "linear"}, "holds no draft"),
        ({"rope_scaling": {"rope_type": "linear"}}, "holds no draft"),
        ({"head_dim": None}, "head_dim None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
        ([], "no EAGLE-3 draft"),
    ],
)
def test_a_config_that_no_server_could_follow_is_refused(folder, embedding, change, message):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change} if change else change
    path.write_text(json.dumps(config))
    with pytest.raises(SetupError, match=message):
        ServedDraft(folder, embedding)


def test_weights_cut_short_and_layers_that_the_base_lacks(folder, embedding, hf_model):
    with pytest.raises(SetupError, match="output of layer 2, the base has layers 0 to 1"):
        Verifier(load_model(hf_model("llama")), [0, 1, 3])
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(SetupError, match="holds no draft"):
        ServedDraft(folder, embedding)


def test_another_base_or_no_draft_is_refused(folder, embedding, tmp_path):
    with pytest.raises(SetupError, match="a draft of a base with 391 tokens"):
        ServedDraft(folder, embedding[:-1])
    with pytest.raises(SetupError, match="holds no draft"):
        ServedDraft(tmp_path / "nowhere", embedding)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(SetupError, match="no EAGLE-3 draft"):
        ServedDraft(folder, embedding)


def test_acceptance_is_counted_as_vllm_counts():
    found = Acceptance(3, drafts=4, accepted=[4, 2, 1], emitted=9)
    assert found.length == 1 + 7 / 4 and found.rates == [1.0, 0.5, 0.25]
    assert found.emitted_per_pass == 9 / 4
