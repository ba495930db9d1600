"""That upstream still needs what is hooked in; what a save does then is in `tests/runs/test_saving.py`."""

import errno
import functools
import inspect
import shutil
from collections import namedtuple

import pytest
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
from megatron.training import checkpointing, training

from post_training.platform.checkpoints import saving
from post_training.platform.checkpoints.saving import reason_of, save_hooks


def test_all_names_of_the_patched_functions_are_replaced():
    for function in (
        training.save_checkpoint,
        checkpointing.save_checkpoint,
        checkpointing.get_checkpoint_tracker_filename,
        checkpointing.schedule_async_save,
        serialization.save_config,
        filesystem_async.FileSystemWriterAsync.finish,
        filesystem_async.FileSystemWriterAsync.write_preloaded_data,
    ):
        assert function.__module__ and function.__wrapped__ is not None
    assert training.save_checkpoint is checkpointing.save_checkpoint


def test_without_hooks_the_tracker_is_megatrons(tmp_path):
    name = checkpointing.get_checkpoint_tracker_filename(str(tmp_path))
    assert name == str(tmp_path / "latest_checkpointed_iteration.txt")


def test_the_systems_reason_is_found_behind_the_writers_own():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error
    except RuntimeError as error:
        assert reason_of(error) == "No space left on device"
    assert reason_of(ValueError("other")) == "other" and reason_of(ValueError()) == "ValueError"


def test_a_cut_off_file_whose_reason_torch_lost_is_looked_for_on_the_disk(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "a limit on the size of files" in reason_of(error, str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 0))
    assert reason_of(error, str(tmp_path)) == "No space left on device"
    assert reason_of(ValueError("other"), str(tmp_path)) == "other"


def test_what_one_rank_cannot_write_is_noted_where_somebody_listens(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = functools.partial(saving._noting_problems, full)
    with pytest.raises(OSError, match="No space"):
        write()
    monkeypatch.setattr(save_hooks, "finish", lambda iteration, error: None)
    monkeypatch.setattr(save_hooks, "problems", [])
    write()
    assert save_hooks.problems == ["No space left on device"]


def test_still_needed_upstream_empties_the_tracker_before_it_writes_it():
    source = inspect.getsource(checkpointing.save_checkpoint.__wrapped__)
    assert "maybe_msc.open(tracker_filename, 'w')" in source
    assert "os.replace" not in source and ".rename(" not in source


def test_still_needed_upstream_tells_only_the_type_of_an_error():
    writer = filesystem_async.FileSystemWriterAsync
    source = inspect.getsource(writer.write_preloaded_data_multithread)
    assert "assert isinstance(local_results_or_exc, list), type(local_results_or_exc)" in source


def test_still_needed_upstream_lets_the_others_wait_when_rank_0_cannot_write():
    source = inspect.getsource(state_dict_saver.save_state_dict_async_finalize)
    assert "storage_writer.finish(" in source and "try" not in source
