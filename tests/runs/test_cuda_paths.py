"""The paths that only a GPU takes, on a machine without one (`tests/helpers/cuda_double.py`)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT, command, finetune, run_script
from tests.helpers.rows import make_rows, write_rows

FLAGS = ["--seq-length", "256", "--global-batch-size", "4", "--train-iters", "3", "--seed", "5"]
# What runs once a micro batch: while it waits for the GPU, the GPU waits for it.
EACH_MICRO_BATCH = (
    *("batch/assemble", "batch/host_tensors", "batch/iterators", "batch/packed_documents"),
    *("batch/trained_tokens", "training/loss", "model/attention"),
    *("hf_models/attention", "hf_models/packing"),
)


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(folder):
    steps = records(folder / "metrics.jsonl")
    return [record["lm_loss"] for record in steps if "lm_loss" in record]


CASES = [
    # Adam's buffers would move the weights to the GPU; under SGD nothing of Megatron does.
    ("qwen3", ["--micro-batch-size", "2", "--use-cpu-initialization", "--optimizer", "sgd"], 1),
    ("llama", ["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    ("qwen2", ["--use-torch-fsdp2"], 2),
    ("gemma3_text", [], 2),
    ("qwen3_moe", ["--context-parallel-size", "2", "--moe-aux-loss-coeff", "0.01"], 2),
]


def run_on_gpus(report, *words, world=1):
    """Run a script of this project on the double; its reports by rank are written to `report`.RANK."""
    done = run_script(
        *("-m", "tests.helpers.cuda_double", str(report), *words),
        world=world if world > 1 else None,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows to train on, and to evaluate on."""
    folder = tmp_path_factory.mktemp("rows")
    valid = write_rows(folder / "valid.jsonl", make_rows(5, seed=1))
    return write_rows(folder / "train.jsonl", make_rows(40)), valid


@pytest.fixture(scope="module")
def trained(tmp_path_factory, hf_model, files):
    """Trains a case, once, on the double: what it printed, its folder, and the flags without the case's."""
    made: dict[str, tuple[Any, Path, list[str]]] = {}

    def trained(family, flags, world):
        if family in made:
            return made[family]
        train, valid = files
        folder = tmp_path_factory.mktemp(family)
        common = ["--hf-model", str(hf_model(family)), "--finetune-data-files", str(train), *FLAGS]
        common += ["--valid-data-files", str(valid), "--no-progress"]
        words = ["finetune.py", *common, *flags, "--output-dir", str(folder / "out")]
        done = run_on_gpus(folder / "report", *words, world=world)
        made[family] = (done, folder, common)
        return made[family]

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(("family", "flags", "world"), CASES)
def test_a_run_on_gpus_keeps_tensors_apart_and_does_not_wait_in_a_micro_batch(
    tmp_path, trained, family, flags, world
):
    done, folder, common = trained(family, flags, world)
    assert "stay the same bit for bit" in done.stderr
    for rank in range(world):
        report = json.loads((folder / f"report.{rank}").read_text())
        # bf16, the default on a GPU, goes through the kernel for packs.
        assert report["kernel_calls"] > 0
        waited = [
            place
            for place in report["waits"]
            if place.startswith(tuple(f"post_training/{name}.py" for name in EACH_MICRO_BATCH))
        ]
        assert not waited, report["waits"]

    on_cpu = finetune(tmp_path / "cpu", *common, *(flags if world == 1 else []))
    assert losses(folder / "out") == pytest.approx(losses(on_cpu.folder), rel=2e-3)


@pytest.mark.slow
def test_sigterm_of_torchrun_saves_on_gpus(tmp_path, hf_model, chat_data):
    """torchrun sends it to all processes of a rank's group, to those that help to save as well."""
    folder = tmp_path / "gpu"
    words = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    words += [*FLAGS, "--train-iters", "4000", "--save-interval", "2", "--no-progress", "--bf16"]
    double = ("-m", "tests.helpers.cuda_double", str(tmp_path / "report"), "finetune.py")
    with (tmp_path / "console").open("w") as console:
        running = subprocess.Popen(
            command(*double, *words, "--output-dir", str(folder), world=2),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stderr=console,
        )
        tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
        deadline = time.monotonic() + LIMIT
        while not tracker.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        running.wait(LIMIT)
    told = (tmp_path / "console").read_text()
    last = len(losses(folder))
    assert 2 <= last < 4000, told
    assert f"stopped after step {last} of 4000 (SIGTERM received)" in told, told
    assert tracker.read_text() == str(last)
    again = finetune(folder, *words, "--exit-interval", str(last + 1), world=2).ok()
    assert f"continuing after step {last}" in again.console


@pytest.mark.slow
def test_a_run_of_fsdp2_on_gpus_is_read_in_one_process(tmp_path, trained, files):
    """Its model is made on the host, where neither the tools nor `--eval-only` may leave it."""
    _, folder, common = trained(*CASES[2])
    out = folder / "out"
    own = next(each for each in records(out / "metrics.jsonl") if "split" in each)
    run = ["--output-dir", str(out)]
    run_on_gpus(tmp_path / "report", "finetune.py", *common, *CASES[2][1], *run, "--eval-only")
    (again,) = records(out / "evaluations.jsonl")
    assert again["tokens"] == own["tokens"]
    assert again["loss"] == pytest.approx(own["loss"], rel=1e-3)

    scores = tmp_path / "scores.json"
    rows = ["--data", str(files[1]), "--max-new-tokens", "3", "--json", str(scores)]
    run_on_gpus(tmp_path / "report", "scripts/evaluate.py", *run, *rows)
    assert len(json.loads(scores.read_text())["answers"]) == 5
    done = run_on_gpus(tmp_path / "report", "scripts/generate.py", *run, "--prompt", "2 + 2?")
    assert done.stdout.strip()
    done = run_on_gpus(tmp_path / "report", "scripts/export_hf.py", *run)
    assert "logits agree within" in done.stdout and (out / "hf" / "config.json").is_file()
