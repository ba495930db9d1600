"""What stored features depend on, and what every rank is to know of them before it is sent any."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from data.documents.documents import Documents
from data.features.dataset import open_features
from data.features.manifest import hidden_fields
from data.features.writer import FeatureWriter
from data.prepare.prepare import prepare_rows
from model_provider import check_weights
from post_training.arguments.parser import parse_arguments
from post_training.distillation import features
from post_training.distillation.features import (
    check_states,
    made_by,
    stored_features,
    stored_names,
    wanted_features,
)
from post_training.errors import SetupError
from tests.helpers.models import edit_json, load_model, make_tokenizer
from tests.helpers.rows import CHATML, make_rows


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    words = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / "out")]
    return lambda *more: parse_arguments([*words, "--train-iters", "3", *more])


def test_a_template_is_what_it_says_wherever_it_lies(parse, tmp_path):
    tokenizer = make_tokenizer()
    plain = made_by(parse(), tokenizer)
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text(CHATML)
        assert made_by(parse("--chat-template", str(tmp_path / name)), tokenizer) == plain
    (tmp_path / "b.jinja").write_text(CHATML + "{# another #}")
    other = made_by(parse("--chat-template", str(tmp_path / "b.jinja")), tokenizer)
    assert {key for key in plain if plain[key] != other[key]} == {"template"}


def test_features_are_of_weights_tokens_and_architecture(parse, hf_model, tmp_path):
    """The same weights read by another config.json compute other numbers."""
    tokenizer = make_tokenizer()
    plain = made_by(parse(), tokenizer)
    folder = Path(shutil.copytree(hf_model("qwen3"), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    rope = {**(config.get("rope_parameters") or {}), "rope_type": "default", "rope_theta": 77.0}
    edit_json(folder / "config.json", rope_parameters=rope, rope_theta=77.0)
    other = made_by(parse("--hf-model", str(folder)), tokenizer)
    assert {key for key in plain if plain[key] != other[key]} == {"architecture"}
    online = wanted_features(tokenizer, parse("--draft", "eagle3"))
    assert online == {key: plain[key] for key in ("tokenizer", "template")}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--export-offline-model --offline-distillation-data F --random-weights", "its weights"),
        ("--draft eagle3 --draft-vocab-size 64 --eval-only", "follows from training data"),
    ],
)
def test_a_new_draft_needs_a_trained_base_and_its_tokens(parse, flags, said):
    with pytest.raises(SetupError, match=said):
        check_weights(parse(*flags.split()), None)


@pytest.fixture
def sample(hf_model, tmp_path):
    """Save what a base computes of a document as other dumpers do; returns the folder's features."""

    def save(**changes):
        ids = torch.arange(20) + 3
        base = load_model(hf_model("qwen3"))
        last: list[torch.Tensor] = []
        base.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
        with torch.no_grad():
            states = base(ids[None], output_hidden_states=True).hidden_states
        aux = torch.cat([*states[:2], last[0].view(1, 20, -1)], dim=-1)[0]
        (tmp_path / "pt").mkdir()
        found = {"input_ids": ids, "hidden_states": states[-1][0], "aux_hidden_states": aux}
        torch.save(
            {**found, **{k: f(found, last) for k, f in changes.items()}}, tmp_path / "pt/0.pt"
        )
        return open_features(tmp_path / "pt")

    return save


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"aux_hidden_states": lambda f, last: f["aux_hidden_states"].bfloat16(),
          "hidden_states": lambda f, last: f["hidden_states"].bfloat16()}, None),
        ({"hidden_states": lambda f, last: last[0].view(20, -1)}, "behind the final norm"),
        ({"input_ids": lambda f, last: f["input_ids"] * 2}, "the embedding of its tokens"),
        ({"aux_hidden_states": lambda f, last: f["aux_hidden_states"].roll(64, 1)}, "--aux-layers"),
    ],
)  # fmt: skip
def test_states_of_unknown_origin_bear_the_marks_of_the_base(parse, sample, changes, said):
    args = parse("--export-offline-model", "--offline-distillation-data", "F")
    with pytest.raises(SetupError, match=said) if said else nullcontext():
        check_states(sample(**changes), args)


def write(folder, documents: Documents, dtype, kind):
    fields = hidden_fields(64, dtype, 3)
    writer = FeatureWriter(folder, documents, fields, {})
    tokens = int(documents.lengths.sum())
    writer.write(0, {f.name: torch.zeros(tokens, f.width, dtype=kind) for f in fields})
    writer.finish()


def test_splits_of_another_dtype_are_refused(parse, tmp_path):
    """Each rank of a tensor parallel group makes room for what the first one sends."""
    documents = prepare_rows(make_rows(4), tokenizer=make_tokenizer(), seq_length=192)
    (tmp_path / "F/.cache").mkdir(parents=True)
    (tmp_path / "F/logs").mkdir()
    write(tmp_path / "F/train", documents, "bf16", torch.bfloat16)
    args = parse("--export-offline-model", "--offline-distillation-data", str(tmp_path / "F"))
    expected = {"aux_hidden_states": (192, torch.bfloat16), "hidden_states": (64, torch.bfloat16)}
    assert stored_features(args) == expected
    features._kinds.cache_clear()
    write(tmp_path / "F/valid", documents, "fp32", torch.float32)
    with pytest.raises(SetupError, match="the features of valid have another width or dtype"):
        stored_features(args)
    # Of what is not read nothing is asked.
    args = parse(
        "--export-offline-model", "--eval-only", "--offline-distillation-data", str(tmp_path / "F")
    )
    assert stored_features(args)["hidden_states"] == (64, torch.float32)
    with pytest.raises(SetupError, match="name them by --offline-distillation-data"):
        stored_names(parse("--export-offline-model", "--eval-only", "--valid-data-files", "v"))


def test_trained_tokens_are_counted_and_equals_go_to_the_lower():
    documents = [
        (np.array([9, 9, 9, 5, 7], np.int32), np.array([0, 0, 0, 1, 1], np.uint8)),
        (np.array([7, 3, 5, 7], np.int32), np.array([1, 1, 1, 0], np.uint8)),
    ]
    # 5 and 7 twice, 3 once, the others never; 9 only where it is not trained.
    find = features.most_trained_tokens
    assert torch.equal(find(documents, 2, 12), torch.tensor([5, 7]))
    assert torch.equal(find(documents, 4, 12), torch.tensor([0, 3, 5, 7]))
