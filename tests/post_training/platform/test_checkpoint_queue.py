import inspect
import os
import pathlib
import queue
import signal
import time
from argparse import Namespace

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from post_training.platform import checkpoint_queue
from tests.helpers.launch import run_rank


def test_synchronous_saves_use_a_queue_of_this_process(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    checkpoint_queue.apply(Namespace(async_save=False))
    assert isinstance(filesystem_async.get_write_results_queue(), queue.Queue)


def _queue_of_asynchronous_saves():
    args = Namespace(async_save=True, use_persistent_ckpt_worker=True)
    checkpoint_queue.apply(args)
    results = filesystem_async.get_write_results_queue()
    results.put("a result")  # as the writer, another process, does
    return results.get(timeout=10), args.use_persistent_ckpt_worker


@pytest.mark.slow
def test_asynchronous_saves_on_a_cpu_have_a_writer_for_each_save():
    assert run_rank(_queue_of_asynchronous_saves) == ("a result", False)


def _writer_dies_with_its_parent(file):
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            checkpoint_queue.end_with_parent()
            pathlib.Path(file).write_text(str(os.getpid()))
            time.sleep(60)
        time.sleep(60)
    while not pathlib.Path(file).exists() or not (text := pathlib.Path(file).read_text()):
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
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


def test_still_needed_upstream_starts_a_process():
    source = inspect.getsource(filesystem_async.get_write_results_queue)
    assert "'spawn'" in source and ".Manager().Queue()" in source


def test_still_needed_upstream_wants_a_persistent_worker_that_shares_memory():
    from megatron.core.dist_checkpointing.strategies import async_utils
    from megatron.training import arguments

    assert "Disabling --async-save" in inspect.getsource(arguments.validate_args)
    source = inspect.getsource(async_utils.PersistentAsyncCaller.async_loop)
    assert "preload_fn()" in source and ".clone()" not in source
