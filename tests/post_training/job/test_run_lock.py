"""A second run in the same output folder is refused; one that was killed blocks nobody."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest

from post_training.errors import SetupError
from post_training.job import run_lock
from post_training.machine.processes import this_host
from tests.helpers.launch import LIMIT, NO_PROCESS_GROUP, ROOT, finetune, start_finetune
from tests.helpers.reference import Recipe

HOLDER = """
import os, sys, time
from argparse import Namespace
from post_training.job import run_lock
run_lock.hold(Namespace(output_dir=sys.argv[1], rank=0, eval_only=False))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(1200)
"""


def run_in(folder, **more):
    return Namespace(**{"output_dir": str(folder), "rank": 0, "eval_only": False} | more)


@pytest.fixture
def released():
    yield
    release()


def release():
    for lock in run_lock._held.values():
        with contextlib.suppress(OSError):  # of a test in which there are no locks
            lock.release()
    run_lock._held.clear()


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, released):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert first.stdout is not None
    child = int(first.stdout.readline())
    try:
        with pytest.raises(SetupError, match=f"process {first.pid} on .* trains in this folder"):
            run_lock.hold(run_in(tmp_path), wait=0.2)
        run_lock.hold(run_in(tmp_path, eval_only=True), wait=0.0)
        run_lock.hold(run_in(tmp_path, rank=1), wait=0.0)
        # A successor that comes while the run still ends waits for it.
        first.kill()
        # A child of the killed run that lives on does not hold it.
        run_lock.hold(run_in(tmp_path), wait=LIMIT)
        run_lock.hold(run_in(tmp_path), wait=0.0)
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    finally:
        first.kill()
        first.wait()
        os.kill(child, signal.SIGKILL)


def test_without_locks_a_running_holder_of_this_machine_counts(
    tmp_path, released, monkeypatch, capsys
):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    gone = subprocess.Popen(["true"])
    gone.wait()
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"host": this_host(), "pid": os.getppid()}))
    with pytest.raises(SetupError, match=f"process {os.getppid()} "):
        run_lock.hold(run_in(tmp_path), wait=0.0)
    file.write_text(json.dumps({"host": this_host(), "pid": gone.pid}))
    run_lock.hold(run_in(tmp_path), wait=0.0)
    release()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    run_lock.hold(run_in(tmp_path), wait=0.0)
    assert "has no locks" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_twice_at_once(hf_model, chat_data, tmp_path):
    words = [
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *(*Recipe(steps=20_000).flags(), "--save-interval", "20000"),
    ]
    out = tmp_path / "out"
    first = start_finetune(out, *words)
    try:
        first.wait_for_step(1)
        second = finetune(out, *words, environment={NO_PROCESS_GROUP: "1"})
        assert second.status == 2
        assert f"process {first.processes[0].pid} on " in second.console
        assert first.processes[0].exitcode is None
        first.processes[0].kill()
        third = finetune(out, *words, environment={NO_PROCESS_GROUP: "1"})
        assert "trains in this folder" not in third.console
    finally:
        for process in first.processes:
            process.kill()
