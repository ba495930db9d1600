import os
import shutil
from collections import namedtuple

import pytest

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from post_training.job import output
from post_training.layout.model_size import checkpoint_bytes


@pytest.fixture
def args(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    out = str(tmp_path / "out")
    folder = str(hf_model("qwen3"))
    return parse_arguments(["--hf-model", folder, "--output-dir", out, "--train-iters", "1"])


def test_a_full_disk_is_refused_before_anything_runs(args, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = checkpoint_bytes(args)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    output.prepare_output(args)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(SetupError, match=r"takes 2\.\d MiB, its disk has 2\.\d MiB free"):
        output.prepare_output(args)


def test_folder_that_cannot_be_made_is_refused(args, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SetupError, match=r"--output-dir .*: "):
        output.prepare_output(args)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "train.log", "report.html"])
def test_a_folder_in_the_place_of_a_file_is_refused(args, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(SetupError, match=rf"--output-dir .*: {name} is no file"):
        output.prepare_output(args)


def test_a_file_in_the_place_of_a_folder_is_refused(args, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_text("")
    with pytest.raises(SetupError, match=r"--output-dir .*: model is no folder"):
        output.prepare_output(args)
    args.in_output_dir.remove("save")
    args.save = "/dev/null"
    with pytest.raises(SetupError, match=r"--save /dev/null: File exists"):
        output.prepare_output(args)


def test_an_export_of_others_is_seen_before_training(args, tmp_path):
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "thesis.tex").write_text("")
    output.prepare_output(args)
    args.save_hf = True
    with pytest.raises(SetupError, match=r"out/hf: is there already"):
        output.prepare_output(args)


def test_prepared_folder(args, tmp_path):
    output.prepare_output(args)
    assert os.path.isdir(args.save) and (tmp_path / "out").is_dir()
