import argparse

import pytest
import yaml

from post_training.arguments.config_file import (
    apply_settings,
    resolved_config,
    write_config,
)
from post_training.arguments.parser import parse_arguments
from post_training.arguments.ranges import apply_ranges
from post_training.errors import SetupError
from post_training.recipes.recipe import read_recipe


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--data-files", nargs="+")
    parser.add_argument("--style", choices=("cosine", "linear"), default="cosine")
    parser.add_argument("--skip-train", action="store_true")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="rope_fusion")
    apply_ranges(parser)
    return parser


def parse(parser, tmp_path, text, *argv):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    apply_settings(parser, read_recipe(file))
    return parser.parse_args(argv)


def test_names_with_dashes_or_underscores(parser, tmp_path):
    args = parse(parser, tmp_path, "train-iters: 7\nskip_train: true\ndata_files: [a, b]\n")
    assert (args.train_iters, args.skip_train, args.data_files) == (7, True, ["a", "b"])


def test_values_are_read_as_from_the_command_line(parser, tmp_path):
    # YAML 1.1 takes 1e-5 for a string.
    args = parse(parser, tmp_path, "lr: 1e-5\ndata-files: one\n")
    assert args.lr == 1e-5 and args.data_files == ["one"]


def test_a_switch_by_its_flag_or_by_what_it_sets(parser, tmp_path):
    assert parse(parser, tmp_path, "no-rope-fusion: true").rope_fusion is False
    assert parse(parser, tmp_path, "no-rope-fusion: false").rope_fusion is True
    assert parse(parser, tmp_path, "rope_fusion: false").rope_fusion is False


def test_the_command_line_wins(parser, tmp_path):
    assert parse(parser, tmp_path, "lr: 0.5\ntrain-iters: 3", "--lr", "0.25").lr == 0.25


def test_an_empty_file_sets_nothing(parser, tmp_path):
    assert parse(parser, tmp_path, "# nothing\n").lr == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train_itres: 3", ["train_itres", "no such flag", "did you mean train-iters"]),
        ("style: sine", ["style", "'sine'", "cosine, linear"]),
        ("train-iters: many", ["train-iters", "'many'"]),
        ("train-iters: [1, 2]", ["train-iters", "found a list"]),
        ("lr: true", ["lr", "expects a value", "True"]),
        ("skip-train: 3", ["skip-train", "true or false", "3"]),
        ("- lr\n- 3", ["mapping", "list"]),
        # What YAML reads as something else than a word, a number or nothing twice.
        ("lr:", ["lr", "has no value"]),
        ("style: null", ["style", "has no value"]),
        ("lr: {a: b}", ["lr", "expects a number", "'a': 'b'"]),
        ("train-iters: 2024-01-01", ["train-iters", "expects an integer"]),
        ("data-files: {a: b}", ["data-files", "expects text", "a mapping"]),
        ("data-files: [a, 3]", ["data-files", "expects text, found 3"]),
        ("data-files: yes", ["data-files", "expects a value, found True"]),
        ("lr: 1\ntrain-iters: 3\nlr: 2", ["lr is given twice, in lines 1 and 3"]),
        ("train-iters: 3\ntrain_iters: 4", ["train_iters is given twice, in lines 1 and 2"]),
        ("data-files: []", ["data-files", "is an empty list"]),
        # Where YAML 1.1 reads another number than the command line does.
        ("train-iters: 010", ["010 in line 1 is read as 8"]),
        ("lr: 1:30", ["1:30 in line 1 is read as 90"]),
        ("lr: 2024-13-45", ["not valid YAML", "month"]),
        ("config: other.yaml", ["config: a file cannot name another"]),
        ("derived_flags: 3", ["derived_flags: expects a list"]),
        ("learning_rate: 1", ["learning_rate: no such flag; use --lr"]),
        ("lr: [1", ["not valid YAML"]),
    ],
)
def test_mistakes_are_named(parser, tmp_path, text, expected):
    with pytest.raises(SetupError) as caught:
        parse(parser, tmp_path, text)
    assert "run.yaml" in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_missing_file(parser, tmp_path):
    with pytest.raises(SetupError, match=r"--config .*nowhere\.yaml: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_what_a_run_resolved_to_reads_back_as_the_same(hf_model, tmp_path, monkeypatch, family):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    first = parse_arguments(
        [
            *("--hf-model", str(hf_model(family)), "--output-dir", str(tmp_path / "out")),
            *("--train-iters", "3", "--lr", "0.125", "--finetune-data-files", "a.jsonl", "b.jsonl"),
        ]
    )
    config = resolved_config(first)
    write_config(config, first.derived, tmp_path / "config.yaml")
    in_file = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(in_file.pop("derived_flags")) <= set(first.derived)
    assert in_file == config
    again = parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert resolved_config(again) == config
    assert again.hf_config.model_type == family


def test_derived_flags_stand_apart(tmp_path):
    write_config({"lr": 1.0, "num_layers": 2}, ["num_layers"], tmp_path / "config.yaml")
    written, derived = (tmp_path / "config.yaml").read_text().split("# Derived")
    assert "lr: 1.0" in written and "num_layers" not in written and "num_layers: 2" in derived
