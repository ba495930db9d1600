"""Flags of distillation: what follows from them, and what is refused before anything starts."""

import pytest

from post_training.arguments.distillation import draft_of
from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError


@pytest.fixture
def parse(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder = str(hf_model("qwen3"))
    words = ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]
    return lambda *more: parse_arguments([*words, *more])


def test_a_draft_has_three_layers_to_read_and_a_vocabulary(parse):
    args = parse("--draft", "eagle3")
    assert args.aux_layers == [-1, 0, 1] and args.draft_vocab_size is None
    args = parse("--draft", "eagle3", "--aux-layers", "1", "-1", "0", "--draft-vocab-size", "391")
    assert args.aux_layers == [-1, 0, 1] and args.draft_vocab_size is None
    offline = parse("--export-offline-model", "--offline-distillation-data", "F")
    assert draft_of(offline) == {
        "kind": "eagle3",
        "aux_layers": [-1, 0, 1],
        "vocabulary": None,
        "without_decoder": True,
    }
    assert draft_of(parse()) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--export-offline-model", "--offline-distillation-data"),
        (
            "--draft eagle3 --offline-distillation-data F --valid-data-files v.jsonl",
            "valid-data-files",
        ),
        ("--offline-distillation-data F --max-rows 3", "--max-rows: --offline"),
        ("--offline-distillation-data F --split-ratio 0.9,0.1,0", "--split-ratio: --offline"),
        ("--offline-distillation-data F --loss-on last", "--loss-on: --offline"),
        ("--aux-layers 0 1 2", "add --draft eagle3"),
        ("--draft-vocab-size 64", "add --draft eagle3"),
        ("--draft-ttt-steps 3", "add --draft eagle3"),
        ("--draft-loss-decay 0", "add --draft eagle3"),
        ("--draft eagle3 --aux-layers 0 1", "3 different auxiliary hidden states, got 0 1"),
        ("--draft eagle3 --aux-layers 0 0 1", "3 different"),
        ("--draft eagle3 --aux-layers 0 1 2", "layers 0 to 1"),
        ("--draft eagle3 --draft-vocab-size 63 --tensor-model-parallel-size 2", "not a multiple"),
        ("--draft eagle3 --pipeline-model-parallel-size 2", "reads layers of all stages"),
        ("--draft eagle3 --context-parallel-size 2", "cross the parts of a document"),
        ("--draft eagle3 --use-torch-fsdp2", "distributed optimizer"),
        ("--draft eagle3 --save-hf", "scripts/export_hf.py"),
        ("--draft eagle3 --attention-dropout 0.1", "a draft has none"),
        ("--draft medusa", "medusa"),
    ],
)
def test_what_cannot_be_is_one_message(parse, flags, message):
    with pytest.raises(SetupError, match=message):
        parse(*flags.split())


def test_a_rotary_embedding_that_servers_cannot_read_is_refused(hf_model, tmp_path):
    grown = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    grown["original_max_position_embeddings"] = 64
    folder = str(hf_model("qwen3", rope_parameters=grown))
    words = ["--hf-model", folder, "--output-dir", str(tmp_path), "--train-iters", "3"]
    with pytest.raises(SetupError, match="rope type yarn"):
        parse_arguments([*words, "--draft", "eagle3"])
