"""Parts of the batch job that need no scheduler."""

import json
import shlex
import subprocess

import pytest
import torch

from post_training.layout.step_time import DEVICES
from scripts.launchers import health
from scripts.launchers.slurm import KINDS, Job, lead_seconds, submit


def test_the_lead_follows_from_steps_and_saves(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert lead_seconds(file) == 0.0
    records = [{"iteration": n, "step_seconds": 2.0 + n} for n in range(3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert lead_seconds(file) == 0.0, "no save has been measured"
    with file.open("a") as more:
        more.write(json.dumps({"iteration": 3, "save_seconds": 100.0}) + "\n")
    assert lead_seconds(file) == 60.0 + 3 * 4.0 + 2 * 100.0
    with file.open("a") as more:
        more.write('{"iteration": 4, "step_seconds": 1.5e-')  # a line that is being written
    assert lead_seconds(file) == 60.0 + 3 * 4.0 + 2 * 100.0


@pytest.mark.parametrize(
    ("devices", "device", "wrong"),
    [
        (0, "", None),
        (0, "cuda", "sees no GPU"),
        (7, "cuda", "sees 7 GPUs, 8 processes need one each"),
    ],
)
def test_the_odd_node_is_named(tmp_path, monkeypatch, devices, device, wrong):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("SFT_DEVICE", device)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    for name, node in (("n1", None), ("n2", health.look(8))):
        (tmp_path / f"look.{name}").write_text(json.dumps(node))
    job = Job.__new__(Job)
    job.folder, job.nodes = tmp_path, ["n1", "n2", "n3"]
    named = job.odd_nodes().split("; ")
    assert named == [*([f"n2 {wrong}"] if wrong else []), "n3 did not look at its devices"]


@pytest.mark.parametrize(
    ("options", "gpus", "given"),
    [
        ("--gpus-per-node h100:8", "16xh100", "h100:8"),
        ("--gpus-per-node 8 --gpu-type 80gib", "16x80gib", "8"),
        ("--gpus-per-node unheard_of:8", None, "unheard_of:8"),
        ("--gpus-per-node 8", None, "8"),
    ],
)
def test_submit_asks_the_planner_of_gpus_that_it_knows(monkeypatch, options, gpus, given):
    ran = []

    def run(words, **how):
        ran.append(shlex.join(words))
        return subprocess.CompletedProcess(words, 0, "7")

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("SFT_DEVICE", "SFT_PROCESSES_PER_NODE", "SFT_GPU_TYPE"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("SFT_GPU_TYPE")
    assert submit([*f"-N 2 {options} finetune.sbatch".split(), "--lr", "1"]) == 0
    planned = [line for line in ran if "plan.py" in line]
    assert len(planned) == (gpus is not None)
    for line in planned:
        assert f"--check --gpus {gpus} --gpus-per-node 8 --lr 1" in line
    assert f" --gpus-per-node={given} finetune.sbatch --lr 1" in ran[-1]
    assert set(KINDS) == DEVICES.keys()
