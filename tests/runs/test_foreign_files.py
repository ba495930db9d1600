"""ROLL's and RLinf's files with every key that their guides name, each started as its own project's are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.metrics.records import records_of
from scripts.quickstart.vision import make_rows, write_parquet
from tests.helpers import vision
from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT, finetune

FILES = ROOT / "tests/recipes/foreign"
STRATEGY = "sft_train.strategy_args.strategy_config"


@pytest.mark.slow
def test_rolls_file_trains_on_as_many_devices_as_it_names(hf_model, tmp_path):
    rows = [
        {"system": "Add.", "question": f"{n} and one?", "context": "Go on.", "answer": str(n + 1)}
        for n in range(40)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows[8:]))
    (tmp_path / "valid.json").write_text(json.dumps(rows[:8]))
    changes = [
        f"pretrain={hf_model('qwen2')}",
        f"tracker_kwargs.log_dir={tmp_path / 'curves'}",
        f"sft_train.data_args.file_name={tmp_path / 'train.json'}",
        f"validation.data_args.file_name={tmp_path / 'valid.json'}",
        "sft_train.device_mapping=list(range(0,2))",
        *(f"{STRATEGY}.{name}_parallel_size=1" for name in ("pipeline_model", "context")),
    ]
    words = ["--config_path", str(FILES), "--config_name", "sft_config", *changes]
    run = finetune(tmp_path / "out", *words, world=2).ok()
    assert run.losses[-1] < run.losses[0]
    saved = {int(each.name[5:]) for each in (tmp_path / "out/checkpoints").glob("iter_*")}
    evaluated = [each["iteration"] for each in run.records if "split" in each]
    assert saved == {*evaluated} and evaluated[0] == 4  # save_steps and eval_steps
    assert list((tmp_path / "curves").iterdir())


@pytest.mark.slow
def test_rlinfs_file_trains_and_then_only_evaluates(tmp_path):
    vision.save_model(tmp_path / "model", "qwen2_5_vl")
    for name, rows in zip(("train", "valid"), make_rows(1, 40, 8), strict=True):
        write_parquet(tmp_path / f"{name}.parquet", rows)
    variables = {"CONFIG_PATH": str(FILES), "LOGS": str(tmp_path / "logs"), "PROCESSES": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def start(train, *flags):
        """Its folder under the time stamp, and its log."""
        before = set((tmp_path / "logs").glob("*"))
        script = ["bash", str(ROOT / "scripts/run_vlm_sft.sh"), "custom_sft_vlm"]
        data = [f"data.train_data_paths={train}", f"data.val_data_paths={tmp_path}/valid.parquet"]
        model = f"actor.model.model_path={tmp_path / 'model'}"
        environment = os.environ | ENVIRONMENT | variables | path
        done = subprocess.run(
            [*script, *data, model, *flags], cwd=tmp_path, env=environment, timeout=LIMIT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        (folder,) = set((tmp_path / "logs").glob("*")) - before
        log = (folder / "run_vlm_sft.log").read_text()
        assert done.returncode == 0, log
        return folder / "custom_sft_vlm", log

    output, log = start(tmp_path / "train.parquet", "--train-iters", "4")
    assert "is RLinf's" in log and "done: 4 steps" in log
    assert [r["iteration"] for r in records_of(output) if "split" in r] == [2, 4]
    output, log = start("null")
    (found,) = records_of(output, "evaluations.jsonl")
    assert found["split"] == "valid" and found["iteration"] == 0
