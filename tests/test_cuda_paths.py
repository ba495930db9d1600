"""The paths that only a GPU takes, on a machine without one (`tests/helpers/cuda_double.py`)."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.helpers.launch import ENVIRONMENT, ROOT, command, finetune, run_script
from tests.helpers.rows import make_rows, write_rows

FLAGS = ["--seq-length", "256", "--global-batch-size", "4", "--train-iters", "3", "--seed", "5"]
# What runs once a micro batch: while it waits for the GPU, the GPU waits for it.
EACH_MICRO_BATCH = ("batch", "host_tensors", "packed_sequences", "loss", "attention", "router")


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["lm_loss"] for record in records if "lm_loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flags", "world"),
    [
        ("qwen3", ["--micro-batch-size", "2"], 1),
        ("llama", ["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
        ("qwen2", ["--use-torch-fsdp2"], 2),
        ("qwen3_moe", ["--context-parallel-size", "2", "--moe-aux-loss-coeff", "0.01"], 2),
    ],
)
def test_a_run_on_gpus_keeps_tensors_apart_and_does_not_wait_in_a_micro_batch(
    tmp_path, hf_model, family, flags, world
):
    data, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    write_rows(data, make_rows(40))
    write_rows(valid, make_rows(5, seed=1))
    model = hf_model(family)
    common = ["--hf-model", str(model), "--finetune-data-files", str(data), *FLAGS]
    common += ["--valid-data-files", str(valid), "--no-progress"]
    folder = tmp_path / "gpu"
    done = run_script(
        *("-m", "tests.helpers.cuda_double", str(tmp_path / "report"), "finetune.py"),
        *(*common, *flags, "--output-dir", str(folder)),
        world=world if world > 1 else None,
    )
    log = folder / "train.log"
    assert done.returncode == 0, done.stderr[-3000:] + (
        log.read_text()[-3000:] if log.exists() else ""
    )
    assert "stay the same bit for bit" in done.stderr
    for rank in range(world):
        report = json.loads((tmp_path / f"report.{rank}").read_text())
        # bf16, the default on a GPU, goes through the kernel for packs.
        assert report["kernel_calls"] > 0
        waited = [
            place
            for place in report["waits"]
            if place.startswith(tuple(f"post_training/{name}.py" for name in EACH_MICRO_BATCH))
        ]
        assert not waited, report["waits"]

    on_cpu = finetune(tmp_path / "cpu", *common)
    assert losses(folder) == pytest.approx(losses(on_cpu.folder), rel=2e-3)


@pytest.mark.slow
def test_sigterm_of_torchrun_saves_on_gpus(tmp_path, hf_model, chat_data):
    """torchrun sends it to all processes of a rank's group, to those that help to save as well."""
    folder = tmp_path / "gpu"
    words = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    words += [*FLAGS, "--train-iters", "500", "--save-interval", "2", "--no-progress", "--bf16"]
    double = ("-m", "tests.helpers.cuda_double", str(tmp_path / "report"), "finetune.py")
    with (tmp_path / "console").open("w") as console:
        running = subprocess.Popen(
            command(*double, *words, "--output-dir", str(folder), world=2),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stderr=console,
        )
        tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
        deadline = time.monotonic() + 120
        while not tracker.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        running.wait(120)
    told = (tmp_path / "console").read_text()
    last = len(losses(folder))
    assert 2 <= last < 500, told
    assert f"stopped after step {last} of 500 (SIGTERM received)" in told, told
    assert tracker.read_text() == str(last)
    again = finetune(folder, *words, "--exit-interval", str(last + 1), world=2).ok()
    assert f"continuing after step {last}" in again.console
