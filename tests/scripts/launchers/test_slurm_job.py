"""Parts of the batch job that need no scheduler."""

import json

import pytest
import torch

from scripts.launchers import health
from scripts.launchers.slurm import Job, lead_seconds


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
