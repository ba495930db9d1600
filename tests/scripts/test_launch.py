"""`scripts/launch.py` ends with its workers' status, and says nothing that they have said."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from scripts.launch import status_of
from tests.helpers.launch import ENVIRONMENT, ROOT, run_script

WORKER = """
import os, pathlib, signal, sys, time

def begin(folder, handler):
    "Ready for a signal, which is sent when all are."
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    pathlib.Path(folder, os.environ["RANK"]).touch()
    signal.pause()

how, folder = sys.argv[1:]
first = os.environ["RANK"] == "0"
if how == "saves":
    begin(folder, lambda number, frame: sys.exit(0))
if how == "signal":
    begin(folder, signal.SIG_DFL)
if how == "interrupt":
    begin(folder, lambda number, frame: sys.exit(130))
if how == "refuses":
    sys.exit(2)
if how == "refuses alone" and first:
    sys.exit(2)
if how == "killed" and first:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "crashes" and first:
    raise ZeroDivisionError("of its own making")
signal.pause()
"""


def words(tmp_path, how):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return ["scripts/launch.py", "--nproc-per-node", "2", str(script), how, str(tmp_path)]


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("refuses", 2, []),
        ("refuses alone", 2, []),
        ("killed", 1, ["rank 0 (process", "was ended by SIGKILL"]),
        ("crashes", 1, ["ZeroDivisionError: of its own making", "rank 0 (", "ended with status 1"]),
    ],
)
def test_workers_that_end_by_themselves(tmp_path, how, status, told):
    done = run_script(*words(tmp_path, how))
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and "torch" not in done.stderr
    assert all(done.stderr.count(text) == 1 for text in told), done.stderr
    assert bool(done.stderr) == bool(told), done.stderr


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("saves", signal.SIGINT, 0),
        ("saves", signal.SIGTERM, 0),
        ("interrupt", signal.SIGINT, 130),
        ("signal", signal.SIGINT, 130),
        ("signal", signal.SIGTERM, 143),
    ],
)
def test_a_signal_goes_to_the_workers_whose_status_counts(tmp_path, how, number, status):
    launcher = subprocess.Popen(
        [sys.executable, *words(tmp_path, how)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.send_signal(number)
    _, error = launcher.communicate()
    assert (launcher.returncode, error) == (status, "")


def test_a_script_that_is_not_there():
    done = run_script("scripts/launch.py", "--nproc-per-node", "2", "nowhere.py")
    assert (done.returncode, done.stderr) == (2, "error: nowhere.py: no such file\n")


@pytest.mark.parametrize(
    "words",
    [
        ["--nproc-per-node", "x"],
        ["--nproc-per-node", "0"],
        ["--nnodes", "2", "--node-rank", "2"],
        ["--nnodes", "x", "--dry-run"],
        ["--nnodes", "2:1", "--dry-run"],
        ["--nothing"],
        ["--no-python", "/no"],
    ],
    ids=" ".join,
)
def test_arguments_of_torchrun_that_cannot_be_used_are_one_line(words):
    done = run_script("scripts/launch.py", *words, "finetune.py")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    if words[-1] in ("0", "2"):  # of which torchrun says nothing, or waits for
        assert words[-2] in done.stderr


def test_a_refused_layout_is_one_line(hf_model, chat_data, tmp_path):
    files = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    flags = ["--tensor-model-parallel-size", "3", "--output-dir", str(tmp_path / "out")]
    launcher = ["scripts/launch.py", "--nproc-per-node", "2", "finetune.py"]
    done = run_script(*launcher, *files, *flags, "--train-iters", "1")
    assert done.returncode == 2, done.stderr
    starting, *lines = done.stderr.splitlines()
    assert starting.startswith("starting: ")
    # Of one rank, or of both where the second was as fast as the launcher that ends it.
    assert 1 <= len(lines) <= 2
    for line in lines:
        assert line.removeprefix("error ").startswith(("error: ", "on rank 1: "))
        assert "cannot be divided by tensor 3" in line


def test_a_dry_run_prints_layout_and_command(hf_model, chat_data, tmp_path):
    script = ["finetune.py", "--hf-model", str(hf_model("qwen3")), "--train-iters", "1"]
    script += ["--finetune-data-files", str(chat_data.file), "--output-dir", str(tmp_path / "out")]
    nodes = ["--nnodes", "2", "--nproc-per-node", "2"]
    layout = ["--tensor-model-parallel-size", "2"]
    done = run_script("scripts/launch.py", *nodes, "--dry-run", *script, *layout)
    assert done.stdout.split() == ["torchrun", *nodes, *script, *layout], done.stderr
    assert "layout: 4 processes = tensor 2 x data 2; a step is 2 packs" in done.stderr
    done = run_script("scripts/launch.py", *nodes, "--dry-run", *script, layout[0], "3")
    assert (done.returncode, done.stdout) == (2, "") and "cannot be divided" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("exits", "status"),
    [
        ([2, -signal.SIGTERM], 2),  # torchrun ended the second
        ([130, -signal.SIGKILL], 130),  # it waited where no handler of Python runs
        ([-signal.SIGINT, 130], 130),
        ([1, -signal.SIGKILL], 1),  # killed for want of memory
        ([-signal.SIGKILL, -signal.SIGTERM], 1),
        ([1, 2], 1),
        ([-signal.SIGSEGV], 1),
        ([3], 1),
    ],
)
def test_one_status_of_many(exits, status):
    failures = [ProcessFailure(rank, 1, code, "") for rank, code in enumerate(exits)]
    assert status_of(failures) == status
