"""Saving for real: a disk that is full, old checkpoints, and asynchronous saves."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers import faults
from tests.helpers.checkpoint import same_tensors
from tests.helpers.launch import Running, finetune, run_rank, start_finetune
from tests.numerics.equivalence import PP2
from tests.runs.resume import DROPOUT, RECIPE, numbers

SAVES = ["--save-interval", "2"]


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    model = str(hf_model("qwen3"))
    return ["--hf-model", model, "--finetune-data-files", str(chat_data.file), *RECIPE.flags()]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """Saves every other step and keeps all."""
    return finetune(tmp_path_factory.mktemp("straight") / "out", *words, *SAVES).ok()


def iterations(run):
    return sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("iter_*"))


def tracked(run):
    return int((run.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())


def test_old_checkpoints_are_removed_and_the_run_is_the_same(words, straight, tmp_path):
    assert iterations(straight) == [2, 4, 6, 8]
    flags = [*SAVES, "--keep-checkpoints", "2"]
    for last in (3, 8):  # stopped in between
        run = finetune(tmp_path / "out", *words, *flags, "--exit-interval", str(last)).ok()
        assert iterations(run) == ([2, 3] if last == 3 else [6, 8]) and tracked(run) == last
    assert numbers(run) == numbers(straight)


@pytest.mark.slow
def test_async_save_changes_nothing(words, straight, tmp_path):
    """Training goes on while the forked process writes: what it writes is the step's state all the same."""
    flags = [*SAVES, "--async-save", "--keep-checkpoints", "3"]
    run = finetune(tmp_path / "out", *words, *flags).ok()
    assert numbers(run) == numbers(straight)
    assert iterations(run) == [4, 6, 8] and tracked(run) == 8
    for iteration in (4, 6, 8):
        name = f"checkpoints/iter_{iteration:07d}"
        assert run_rank(same_tensors, run.folder / name, straight.folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PP2, ()], ids=["pp2", "dp2"])
def test_async_save_on_two_ranks_with_dropout(words, tmp_path, layout):
    flags = [*words, *SAVES, *layout, *DROPOUT]
    expected = finetune(tmp_path / "sync", *flags, world=2).ok()
    finetune(tmp_path / "out", *flags, "--async-save", "--exit-interval", "5", world=2).ok()
    run = finetune(tmp_path / "out", *flags, "--async-save", world=2).ok()
    assert numbers(run) == numbers(expected)
    last = "checkpoints/iter_0000008"
    assert run_rank(same_tensors, run.folder / last, expected.folder / last)


def _children(running: Running) -> list[int]:
    """Processes that the ranks have forked."""
    parents = {process.pid for process in running.processes}
    lines = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [line.split() for line in lines.splitlines()[1:]]
    return [int(pid) for pid, parent in pairs if int(parent) in parents]


@pytest.mark.slow
def test_ctrl_c_waits_for_the_asynchronous_write(words, straight, tmp_path):
    """Ctrl-C reaches all processes of a terminal, the writers too."""
    flags = [*words, "--train-iters", "4000", "--lr-decay-iters", "8", *SAVES, "--async-save"]
    running = start_finetune(tmp_path / "out", *flags, world=2)
    running.wait_for_step(3)
    for pid in [*_children(running), *(process.pid for process in running.processes)]:
        try:
            os.kill(pid, signal.SIGINT)
        except ProcessLookupError:
            continue  # a writer that has just finished
    run = running.wait().ok()
    assert run.console.count("SIGINT: saving") == 1, "once, not by each process"
    last = run.steps[-1]["iteration"]
    assert tracked(run) == last and not list(run.folder.glob("checkpoints/*.saving"))
    again = finetune(tmp_path / "out", *flags, "--exit-interval", str(last + 1), world=2).ok()
    assert f"continuing after step {last}" in again.console


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_write_that_fails_ends_the_run_and_keeps_the_checkpoint_before(
    words, straight, tmp_path, how
):
    flags = [*words, *SAVES, *(["--async-save"] if how == "async" else [])]
    inject = faults.limit_files_at_step_4
    running = start_finetune(tmp_path / "out", *flags, world=2, inject=inject)
    run = running.wait()
    assert run.statuses == [1, 1] and tracked(run) == 2
    failed = 4
    (message,) = [line for line in run.console.splitlines() if line.startswith("error")]
    for text in (
        f"checkpoint of step {failed} cannot be written to {run.folder}/checkpoints",
        "File too large",
        "MiB free" if "MiB free" in message else "GiB free",
        f"that of step {failed - 2} is whole",
        "same command",
    ):
        assert text in message
    assert running.consoles[1].read_text() == ""
    assert "Traceback" not in run.console
    assert iterations(run) == list(range(2, failed, 2))
    again = finetune(tmp_path / "out", *flags, world=2).ok()
    assert [step["iteration"] for step in again.steps] == list(range(1, 9))


@pytest.mark.slow
def test_a_killed_writer_is_no_full_disk(words, tmp_path):
    run = finetune(
        tmp_path / "out", *words, *SAVES, "--async-save", world=2, inject=faults.killed_writer
    )
    (message,) = [line for line in run.console.splitlines() if line.startswith("error")]
    assert run.statuses == [1, 1] and "rank 1: the process that wrote it was killed" in message
    assert "make room" not in message and "give the same command again" in message
    assert iterations(run) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 9 MiB: checkpoints of these tests take 2.6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    yield folder
    for _ in range(600):
        if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(words, straight, small_disk, world):
    run = finetune(small_disk / "out", *words, *SAVES, world=world)
    assert run.statuses == [1] * world
    (message,) = [line for line in run.console.splitlines() if line.startswith("error")]
    for text in ("cannot be written to", "it takes 2.", "disk is too full", "MiB free", "is whole"):
        assert text in message
    assert "Traceback" not in run.console
    last = tracked(run)
    assert iterations(run) == list(range(2, last + 1, 2)) and last < 8
    # The same command says so at once, before it trains.
    again = finetune(small_disk / "out", *words, *SAVES, world=world)
    assert again.statuses == [2] * world and "make room" in again.console
    for iteration in iterations(run)[:-1]:
        shutil.rmtree(small_disk / f"out/checkpoints/iter_{iteration:07d}")
    flags = [*SAVES, "--keep-checkpoints", "1"]
    run = finetune(small_disk / "out", *words, *flags, world=world).ok()
    assert iterations(run) == [8]
    if world == 1:
        assert numbers(run) == numbers(straight)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--use-torch-fsdp2",)], ids=["dp2", "fsdp2"])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(words, straight, small_disk, layout):
    run = finetune(
        small_disk / "out",
        *(*words, *SAVES, *layout),
        world=2,
        environment={faults.DISK: str(small_disk)},
        inject=faults.fill_disk_in_a_save,
    )
    assert run.statuses == [1, 1]
    (message,) = [line for line in run.console.splitlines() if line.startswith("error")]
    assert "No space left on device" in message and "there is none before it" in message
    assert iterations(run) == []
    (small_disk / "filler").unlink()
    flags = [*words, *layout, "--save-interval", "7"]
    again = finetune(small_disk / "out", *flags, world=2).ok()
    assert [step["iteration"] for step in again.steps] == list(range(1, 9))


@pytest.mark.slow
def test_a_disk_that_fills_up_between_saves(words, small_disk):
    """Log lines are gone on without; the first rank with nowhere to write its records tells and ends."""
    flags = [*words, "--train-iters", "4000", "--lr-decay-iters", "8"]
    running = start_finetune(small_disk / "out", *flags, "--save-interval", "3", world=2)
    running.wait_for_step(4)
    for console in running.consoles:  # they lie on the same disk: a block of it each, to tell in
        if not console.stat().st_size:
            console.write_text("\n")
    faults.fill(small_disk)
    run = running.wait()
    assert run.statuses == [1, 1]
    told = "".join(console.read_text() for console in running.consoles)
    (message,) = [line for line in told.splitlines() if line.startswith("error")]
    assert "No space left on device" in message and "make room" in message
    assert "Traceback" not in told and "report.html" not in told, "no second message"
    last = max(iterations(run))
    assert tracked(run) == last
    (small_disk / "filler").unlink()
    again = finetune(small_disk / "out", *flags, "--exit-interval", str(last + 2), world=2).ok()
    assert f"continuing after step {last}" in again.console
    assert [step["iteration"] for step in again.steps] == list(
        range(1, again.steps[-1]["iteration"] + 1)
    )
