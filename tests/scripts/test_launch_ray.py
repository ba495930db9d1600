"""`scripts/launch_ray.py` on a Ray of three nodes, which is this machine's loopback."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import faults
from tests.helpers.held_tree import FAULT, held_tree
from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT, finetune
from tests.helpers.reference import Recipe
from tests.helpers.scheduler import wait_for
from tests.runs.resume import DROPOUT, numbers

pytest.importorskip("ray")

from scripts import launch_ray
from scripts.launch_ray import parse

STEPS = 9


@pytest.mark.parametrize(
    ("mapping", "devices"),
    [("list(range(0,16))", 16), ("list(range(4))", 4), ("[0, 2] + [3, 5]", 4)],
)
def test_devices_of_roll(mapping, devices):
    words = ["--device-mapping", mapping, "--processes-per-node", "4", "--", "--lr", "1"]
    assert parse(words).nodes == devices // 4


@pytest.mark.parametrize(
    "mapping", ["__import__('os')", "[0, 0]", "[]", "[[0], [1]]", f"range({10**40})"]
)
def test_other_mappings_are_refused(mapping, capsys):
    with pytest.raises(SystemExit):
        parse(["--device-mapping", mapping, "--processes-per-node", "1", "--", "--lr", "1"])
    assert "--device-mapping" in capsys.readouterr().err.splitlines()[-1]


def test_sigterm_that_comes_twice_saves_once(monkeypatch):
    done = []

    class Group:
        def __init__(self, options):
            self.running = ["run"]

        def step(self, what, flags):
            if what == "run":
                os.kill(os.getpid(), signal.SIGTERM)
            return 0, {"progress": 0}

        def stop(self, grace):
            os.kill(os.getpid(), signal.SIGTERM)  # as SLURM sends it
            done.append("saved")

        def wait(self, running):
            return 0, {"outcome": "stopped", "step": 3, "reason": "SIGTERM received"}

        def remove(self):
            done.append("removed")

    monkeypatch.setattr(launch_ray, "Group", Group)
    monkeypatch.setattr("ray.init", lambda **_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        words = ["--nodes", "1", "--processes-per-node", "1", "--", "--lr", "1"]
        assert launch_ray.main(words) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert done == ["saved", "removed"]


@pytest.fixture
def cluster(tmp_path):
    """Its address, and the environment of who uses it: with a home folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp"
    ) as folder:  # short: it holds sockets
        environment = os.environ | ENVIRONMENT
        environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        environment |= {faults.HOLD: str(tmp_path / "hold"), FAULT: "hold_where_told"}
        running: Any
        with subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ray_cluster"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as running:
            address = next(line for line in running.stdout if line.startswith("127."))
            yield address.strip(), environment
            running.stdin.close()
            running.wait(LIMIT)
    assert not (home / ".ray").exists()


class Driver:
    """Starts of one run on two nodes, held at the step that `hold` says."""

    def __init__(self, cluster, hf_model, chat_data, folder):
        self.address, self.environment = cluster
        self.output, self.hold, self.log = folder / "out", folder / "hold", folder / "driver.log"
        model = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
        self.words = [*model, *Recipe(steps=STEPS).flags(), *DROPOUT, "--no-progress"]
        self.script = held_tree(folder / "tree") / "finetune.py"

    def start(self, *flags):
        line = [sys.executable, "scripts/launch_ray.py", "--nodes", "2", "--address", self.address]
        line += ["--cpu", "--max-restarts", "1", "--wait", "300"]
        line += ["--processes-per-node", "1", "--script", str(self.script), "--", *self.words]
        line += ["--output-dir", str(self.output), *flags]
        return subprocess.Popen(
            line,
            env=self.environment,
            cwd=ROOT,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def reached(self, running, step):
        def there():
            assert running.poll() is None, self.log.read_text()
            file = self.output / "metrics.jsonl"
            return file.is_file() and f'"iteration": {step}' in file.read_text()

        wait_for(f"step {step}", there)

    def told(self):
        return self.log.read_text()

    def ends_like(self, running, straight):
        assert running.wait(LIMIT) == 0, self.told()
        assert "starting again" in self.told() and "restart 1: complete" in self.told()
        run = replace(straight, folder=Path(self.output))
        assert len(run.steps) == STEPS and numbers(run) == numbers(straight)


@pytest.mark.slow
def test_a_typo_ctrl_c_a_killed_actor_and_a_lost_node(cluster, hf_model, chat_data, tmp_path):
    driver = Driver(cluster, hf_model, chat_data, tmp_path)
    hold = driver.hold
    assert driver.start("--lrr", "1").wait(LIMIT) == 2, driver.told()
    assert "--lrr: no such flag; did you mean --lr" in driver.told()
    assert "starting again" not in driver.told()

    hold.write_text("3")
    running = driver.start()
    driver.reached(running, 2)
    running.send_signal(signal.SIGINT)
    wait_for("the ranks hear of it", lambda: "SIGTERM: saving" in driver.told())
    hold.write_text("6")
    assert running.wait(LIMIT) == 0, driver.told()
    tracker = driver.output / "checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3"

    running = driver.start()
    driver.reached(running, 5)
    os.kill(int(re.findall(r"\(RayNode pid=(\d+)", driver.told())[0]), signal.SIGKILL)
    wait_for("its loss", lambda: "a node is lost" in driver.told())
    hold.write_text("0")
    straight = finetune(tmp_path / "straight", *driver.words, world=2).ok()
    driver.ends_like(running, straight)

    # A node without its raylet is gone for Ray, while its ranks live on and hold the output folder.
    driver.output = tmp_path / "again"
    hold.write_text("3")
    running = driver.start()
    driver.reached(running, 2)
    every = psutil.Process().children(recursive=True)
    raylets = {each.parent() for each in every if each.name().startswith("ray::RayNode")}
    assert len(raylets) == 2
    next(raylet for raylet in raylets if "--head" not in raylet.cmdline()).kill()
    wait_for("its loss", lambda: "a node is lost" in driver.told())
    hold.write_text("0")
    driver.ends_like(running, straight)
