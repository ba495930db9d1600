"""A hung or dead rank ends every rank, with one message that names it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest

from post_training.arguments.completion import PATIENCE
from post_training.job.rank_files import PREFIX, RankFiles, remove_left_over
from post_training.job.watchdog import Watchdog
from post_training.machine.processes import this_host
from tests.helpers import faults
from tests.helpers.launch import LIMIT, ROOT, finetune, run_script, start_finetune
from tests.helpers.reference import Recipe

RECIPE = Recipe(steps=4)
# Of the ranks that are to be found hung, from there on.
TIMEOUT = 4.0


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    return [
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *(*RECIPE.flags(), "--save-interval", "2", "--hang-timeout", "600"),
    ]


def run_until_it_ends(words, folder, *flags, fault, world=2):
    """The statuses of the ended run, and what all ranks printed."""
    environment = {faults.HANG_TIMEOUT: str(TIMEOUT)}
    running = start_finetune(
        folder, *words, *flags, world=world, inject=fault, environment=environment
    )
    deadline = time.monotonic() + LIMIT
    processes = running.processes
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if (
            fault in (faults.stop_at_step_3, faults.hang_in_data)
            and processes[0].exitcode is not None
        ):
            os.kill(processes[1].pid, signal.SIGKILL)  # what a launcher does
        time.sleep(0.05)
    for process in processes:
        process.kill()
    console = "".join(path.read_text() for path in running.consoles)
    return [process.exitcode for process in processes], console


def the_error(console):
    """The one message of the run."""
    lines = console.splitlines()
    assert sum(line.startswith("error") for line in lines) == 1, console
    assert "Traceback" not in console, console
    first = next(i for i, line in enumerate(lines) if line.startswith("error"))
    assert "to continue from the newest checkpoint" in lines[-1]
    return lines[first:]


LAYOUTS = {
    "dp2": ([], 2),
    "tp2": (["--tensor-model-parallel-size", "2"], 2),
    "pp2": (["--pipeline-model-parallel-size", "2"], 2),
    "tp2-dp2": (["--tensor-model-parallel-size", "2"], 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hung_rank_ends_all(words, tmp_path, layout):
    flags, world = LAYOUTS[layout]
    statuses, console = run_until_it_ends(
        words, tmp_path / "out", *flags, fault=faults.hang_at_step_3, world=world
    )
    assert statuses == [1] * world
    lines = the_error(console)
    assert "no progress for " in lines[0]
    assert lines[0].endswith(". All ranks answer:")
    hung = "  rank 1 at step 3: sleep_for_ever (tests/helpers/faults.py:"
    assert sum(line.startswith(hung) for line in lines) == 1
    assert all(" at step 3: " in line for line in lines[1:-1])
    log = (tmp_path / "out/train.log").read_text()
    assert "rank 1 at step 3: no progress" in log and "in sleep_for_ever" in log
    tracker = tmp_path / "out/checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"


@pytest.mark.slow
def test_a_stopped_process_is_named_by_the_others(words, tmp_path):
    statuses, console = run_until_it_ends(words, tmp_path / "out", fault=faults.stop_at_step_3)
    assert statuses == [1, -signal.SIGKILL]
    lines = the_error(console)
    assert lines[0].endswith(". No answer of rank 1:")
    assert lines[1].startswith("  rank 1 was at step 3: its process is stopped")
    assert lines[2].startswith("  rank 0 at step 3: ")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_is_named(words, tmp_path, layout):
    flags, world = LAYOUTS[layout]
    statuses, console = run_until_it_ends(
        words, tmp_path / "out", *flags, fault=faults.kill_at_step_3, world=world
    )
    assert statuses == [1, -signal.SIGKILL, *[1] * (world - 2)]
    lines = the_error(console)
    assert lines[0].startswith("error: rank 1 (process ") and "died at step 3" in lines[0]


@pytest.mark.slow
def test_a_killed_rank_ends_others_that_wait_without_an_end(words, tmp_path):
    statuses, console = run_until_it_ends(
        words, tmp_path / "out", "--hang-timeout", "600", fault=faults.dies_while_others_hang
    )
    assert statuses == [1, -signal.SIGKILL]
    assert "died at step 3" in the_error(console)[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [faults.fail_at_step_3, faults.fails_while_others_hang])
def test_a_failed_rank_alone_shows_its_traceback(words, tmp_path, fault):
    """Not only when the other rank counts as hung."""
    statuses, console = run_until_it_ends(
        words, tmp_path / "out", "--hang-timeout", "100000", fault=fault
    )
    assert statuses == [1, 1]
    assert console.count("Traceback") == 1
    assert "rank 1 failed" in console and "ZeroDivisionError: of its own making" in console
    assert "rank 0" not in console


@pytest.mark.slow
def test_a_rank_that_hangs_before_it_is_watched_is_the_one_that_says_nothing(words, tmp_path):
    statuses, console = run_until_it_ends(
        words, tmp_path / "out", "--hang-timeout", "1", fault=faults.hang_in_data
    )
    assert statuses == [1, -signal.SIGKILL]
    (error,) = [line for line in console.splitlines() if line.startswith("error")]
    assert error.startswith("error: rank 0 in set-up: no progress for ")
    assert "A rank that does not say so has not come so far" in error


@pytest.mark.slow
def test_a_hang_in_set_up(words, tmp_path):
    statuses, console = run_until_it_ends(words, tmp_path / "out", fault=faults.hang_in_set_up)
    assert statuses == [1, 1]
    assert "error: rank 1 in set-up: no progress" in console and "sleep_for_ever" in console


@pytest.mark.slow
def test_a_long_save_is_no_hang(words, tmp_path):
    statuses, console = run_until_it_ends(
        words,
        tmp_path / "out",
        fault=faults.slow_save,
    )
    assert statuses == [0, 0], console
    assert PATIENCE > 1.5
    hidden = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")}
    assert hidden == {".lock"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "fault", "text"),
    [
        ("scripts/launch.py", "kill_at_step_3", "error: rank 1 (process "),
        ("torchrun", "hang_at_step_3", "rank 1 at step 3: sleep_for_ever"),
    ],
    ids=["launch.py", "torchrun"],
)
def test_under_a_launcher(words, tmp_path, launcher, fault, text):
    """The message is there once, and the launcher's status is not zero."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys\n"
        "import finetune\n"
        "from tests.helpers import faults\n"
        f"faults.{fault}()\n"
        "sys.exit(finetune.main())\n"
    )
    flags = [str(script), *words, "--output-dir", str(tmp_path / "out")]
    environment = {faults.HANG_TIMEOUT: str(TIMEOUT)}
    if launcher == "torchrun":
        done = run_script(*flags, world=2, environment=environment)
    else:
        done = run_script(launcher, "--nproc-per-node", "2", *flags, environment=environment)
    assert done.returncode not in (0, None)
    assert done.stderr.count(text) == 1, done.stderr
    assert done.stderr.count("to continue from the newest checkpoint") == 1
    assert "SIGTERM: saving" not in done.stderr


@pytest.mark.parametrize("limit", [LIMIT, 0])
def test_a_rank_whose_launcher_is_gone_is_told_to_save(monkeypatch, tmp_path, limit):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    heard = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *args: heard.set())
    dog = Watchdog()
    dog.files = RankFiles(tmp_path, rank=0, world=1)
    try:
        dog.start(Namespace(hang_timeout=limit, rank=0, output_dir=tmp_path, save=""), sys.stderr)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        # In short waits: a handler runs between two of them, whatever thread the signal reached.
        assert any(heard.wait(0.1) for _ in range(int(10 * LIMIT)))
    finally:
        dog.stop()
        signal.signal(signal.SIGTERM, before)


def test_a_rank_that_waits_in_c_for_a_launcher_that_is_gone_ends(tmp_path):
    code = f"""
import os, sys, time
from argparse import Namespace
from post_training.job import watchdog
watchdog.LAST_SECONDS = 0.1
watchdog.signal.pthread_kill = lambda *args: None  # no handler runs
dog = watchdog.Watchdog()
dog.start(Namespace(hang_timeout={LIMIT}, rank=0, output_dir={str(tmp_path)!r}, save=""), sys.stderr)
os.getppid = lambda: 1
time.sleep({LIMIT})
"""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "one", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=LIMIT)
    assert done.returncode == 143


# --- its parts -----------------------------------------------------------------------------------


@pytest.fixture
def met(tmp_path):
    """A watchdog of rank 0 that knows rank 1, which is gone, and has no thread."""
    child = subprocess.Popen(["true"])
    child.wait()
    dog = Watchdog()
    dog.files = RankFiles(tmp_path, rank=0, world=2)
    dog._neighbours = {1: child.pid}
    dog._console = (tmp_path / "console").open("w")
    return dog


def test_a_rank_that_ended_by_itself_is_not_dead(met):
    # A missing file is no word of an end: somebody removed it.
    assert met.dead(met.files) == [1]
    (met.files.folder / "1").write_text('{"phase": "at step 2"}\n')
    assert met.dead(met.files) == [1]
    (met.files.folder / "1").write_text('{"phase": "ended"}\n')
    assert met.dead(met.files) == []


def test_a_job_ends_once_a_rank_is_gone_or_says_that_it_failed(met):
    """What a launcher then sends is no wish to save."""
    assert met.job_ends()
    (met.files.folder / "1").write_text('{"phase": "ended"}\n')
    assert not met.job_ends()
    met.fail()
    assert met.job_ends()


def test_only_an_error_of_communication_is_another_ranks(met):
    (met.files.folder / "1").write_text('{"phase": "at step 2"}\n')
    assert not met.explains(ValueError("wrong shape"))
    assert "rank 0 failed" in (met.files.folder / "ended").read_text()


def test_a_closed_connection_is_explained_once(met):
    (met.files.folder / "1").write_text('{"phase": "at step 2"}\n')
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")
    assert met.explains(error) and met.explains(error)
    met._console.flush()
    assert (met.files.folder / "console").read_text().count("rank 1") == 1


def test_what_another_machine_has_told_is_not_told_again(met):
    """Only there it is seen that a process is gone."""
    (met.files.folder / "ended").write_text("rank 7 died")
    assert met.explains(ConnectionResetError("Connection reset by peer"))
    met._console.flush()
    assert (met.files.folder / "console").read_text() == ""


def test_only_folders_of_jobs_that_are_gone_are_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    states = {
        "gone": {"0": (this_host(), gone.pid), "1": ("elsewhere", 1)},
        "runs": {"0": (this_host(), gone.pid), "1": (this_host(), os.getpid())},
        "elsewhere": {"0": ("elsewhere", gone.pid)},
        "just made": {},
    }
    for name, ranks in states.items():
        (tmp_path / f"{PREFIX}{name}").mkdir()
        for rank, (host, pid) in ranks.items():
            (tmp_path / f"{PREFIX}{name}" / rank).write_text(json.dumps({"host": host, "pid": pid}))
    remove_left_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {PREFIX + name for name in states} - {
        f"{PREFIX}gone"
    }


def test_the_last_rank_to_end_removes_what_all_have_written(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    ranks = [RankFiles(folder, rank, world=2) for rank in range(2)]
    for files in ranks:
        files.note("at step 2")
        assert folder.exists()
        files.leave()
    assert not folder.exists()


def test_an_alarm_ends_the_job_though_its_folder_is_gone(tmp_path):
    script = (
        "import shutil, sys, tempfile, threading\n"
        "from pathlib import Path\n"
        "from post_training.job.rank_files import RankFiles\n"
        "from post_training.job.watchdog import Watchdog\n"
        "dog, folder = Watchdog(), Path(tempfile.mkdtemp())\n"
        "dog._console, dog.limit, dog.files = sys.stderr, 0.2, RankFiles(folder, 0, 2)\n"
        "shutil.rmtree(folder)\n"
        "dog.beat('at step 3')\n"
        "threading.Thread(target=dog._watch, daemon=True).start()\n"
        "threading.Event().wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "error: rank 0 at step 3: no progress" in done.stderr


def test_an_evaluation_is_patient_with_its_first_batch_only():
    dog = Watchdog()
    dog.limit = 10.0
    dog.beat("evaluating on valid", patient=True, patient_beats=2)
    later = time.monotonic() + 2 * dog.limit
    dog.beat()  # the first batch begins
    assert not dog._stale(later)
    dog.beat()  # and is over
    assert dog._stale(later)
    dog.beat("saving after step 2", patient=True)
    dog.beat()
    dog.beat()
    assert not dog._stale(later)


@pytest.mark.slow
def test_an_evaluation_beside_a_run_leaves_its_watchdog_alone(words, chat_data, tmp_path):
    out = tmp_path / "out"
    environment = {faults.HANG_TIMEOUT: str(TIMEOUT)}
    fault = faults.hang_after_an_evaluation
    running = start_finetune(out, *words, world=2, inject=fault, environment=environment)
    running.wait_for_step(2)
    files = ("--valid-data-files", str(chat_data.file))
    evaluation = finetune(out, *words[:2], *files, *RECIPE.flags()[:4], "--eval-only")
    if evaluation.status:
        running.send(signal.SIGKILL)
    assert evaluation.status == 0, evaluation.console
    assert len(list(out.glob(f"{PREFIX}*"))) == 1, "of the run"
    ended = running.wait()
    assert ended.statuses == [1, 1]
    console = "".join(path.read_text() for path in running.consoles)
    assert "rank 1 at step 3: sleep_for_ever" in console, console
