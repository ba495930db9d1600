import inspect
import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

from post_training.platform import checkpoint_queue


def test_synchronous_saves_use_a_queue_of_this_process(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    checkpoint_queue.apply(async_save=False)
    assert isinstance(filesystem_async.get_write_results_queue(), queue.Queue)


def test_asynchronous_saves_keep_megatrons(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    checkpoint_queue.apply(async_save=True)
    assert filesystem_async._results_queue is None


def test_still_needed_upstream_starts_a_process():
    source = inspect.getsource(filesystem_async.get_write_results_queue)
    assert "'spawn'" in source and ".Manager().Queue()" in source
