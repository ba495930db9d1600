import inspect
import os
import pathlib
import queue
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from post_training.machine.processes import is_running
from post_training.platform.checkpoints import writer_queue
from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT, run_rank


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronous_saves_use_a_queue_of_this_process(monkeypatch, device):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(writer_queue, "device_type", lambda: device)
    writer_queue.apply(Namespace(async_save=False))
    assert isinstance(filesystem_async.get_write_results_queue(), queue.Queue)


def _queue_of_asynchronous_saves():
    writer_queue.apply(Namespace(async_save=True))
    results = filesystem_async.get_write_results_queue()
    results.put("a result")  # as the writer, another process, does
    return results.get(timeout=LIMIT)


@pytest.mark.slow
def test_asynchronous_saves_on_a_cpu_have_a_writer_for_each_save():
    assert run_rank(_queue_of_asynchronous_saves) == "a result"


def _writer_dies_with_its_parent(file):
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            writer_queue.end_with_parent()
            pathlib.Path(file).write_text(str(os.getpid()))
            time.sleep(LIMIT)
        time.sleep(LIMIT)
    while not pathlib.Path(file).exists() or not (text := pathlib.Path(file).read_text()):
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        status = pathlib.Path(f"/proc/{text}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    os.kill(int(text), signal.SIGKILL)
    return False


@pytest.mark.slow
def test_a_writer_does_not_outlive_a_killed_run(tmp_path):
    assert run_rank(_writer_dies_with_its_parent, str(tmp_path / "pid"))


WORKER = """
import os, signal, sys
from argparse import Namespace
from multiprocessing import forkserver
import torch
import finetune  # the worker imports it too: upstream's loop then runs without a GPU
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from post_training.platform.checkpoints import writer_queue

def staged():
    return "staged"

def write(*values):
    values[-1].put(values[:-1])

if __name__ == "__main__":
    writer_queue.device_type = lambda: "cuda"
    writer_queue.apply(Namespace(async_save=True))
    signal.signal(signal.SIGTERM, lambda *args: None)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    owner = async_utils.PersistentAsyncCaller
    print(owner._get_process(0, "forkserver").pid)  # as Megatron's set-up does
    print(forkserver._forkserver._preload_modules)
    os.killpg(0, signal.SIGTERM)
    caller, results = owner(), filesystem_async.get_write_results_queue()
    for number in range(2):
        request = async_utils.AsyncRequest(write, (number, None, results), [], {}, staged)
        caller.schedule_async_call(request)
        assert caller.is_current_async_call_done(blocking=True)
        print(results.get(), flush=True)
        os.killpg(0, signal.SIGTERM)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("an error of this rank")
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "error"])
def test_the_persistent_worker_is_deaf_to_signals_and_ends_with_its_rank(tmp_path, end):
    """As under torchrun, which signals all processes of the rank: while it starts, and between saves."""
    script = tmp_path / "rank.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(script), end],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        start_new_session=True,
        check=False,
    )
    pid, preloaded, *written = done.stdout.splitlines()
    assert preloaded == "[]", "CUDA is not looked at before the worker is forked"
    assert written == ["(0, 'staged')", "(1, 'staged')"], done.stderr
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 1)
    deadline = time.monotonic() + LIMIT
    while is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(int(pid))


def test_still_needed_upstream_starts_a_process():
    source = inspect.getsource(filesystem_async.get_write_results_queue)
    assert "'spawn'" in source and ".Manager().Queue()" in source


def test_still_needed_upstream_wants_a_persistent_worker_that_shares_memory():
    from megatron.core.dist_checkpointing.strategies import async_utils
    from megatron.training import arguments

    assert "Disabling --async-save" in inspect.getsource(arguments.validate_args)
    source = inspect.getsource(async_utils.PersistentAsyncCaller.async_loop)
    assert "preload_fn()" in source and ".clone()" not in source
    assert "signal" not in source and "parent_process" not in source
