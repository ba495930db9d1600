"""`run_vlm_sft.sh`: the launcher hears the signals, and can print until it ends."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.helpers.launch import ROOT

# Stands for the launcher: says what it hears, and ends a moment later.
PYTHON = f"""#!{sys.executable}
import os, signal, sys, time
def end(number, frame):
    time.sleep(0.5)
    print("saved after", number, flush=True)
    os._exit(5)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
print(*sys.argv[1:], sep="|", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
)
def test_signals_reach_the_launcher_whose_last_words_are_logged(tmp_path, number, group):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    logs = tmp_path / "logs of müller"
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOGS": str(logs), "PROCESSES": "2"}
    words = ["bash", str(ROOT / "scripts/run_vlm_sft.sh"), "mine", "actor.seed=3", "--lr", "1e-5"]
    started: Any = subprocess.Popen(
        words,
        env={**os.environ, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    heard = [started.stdout.readline(), started.stdout.readline()]
    assert "|--nproc-per-node|2|finetune.py|" in heard[1]
    assert "|--config-name|mine|actor.seed=3|" in heard[1] and heard[1].endswith("|--lr|1e-5\n")
    (os.killpg if group else os.kill)(started.pid, number)
    assert started.wait(20) == 5
    last = f"saved after {int(number)}\n"
    assert started.stdout.read() == last
    time.sleep(0.1)
    (log,) = logs.glob("*/run_vlm_sft.log")
    assert log.read_text() == "".join([*heard, last])
