"""Runs on a full disk are in `tests/runs/test_saving.py`."""

import errno
import io
import os
import resource

import pytest

from post_training.machine.disk import log_stream, no_room, tell_no_room


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_found_behind_other_errors(number):
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("later") from None
    except RuntimeError as error:
        found = no_room(error)
    assert found is not None and found.errno == number


def test_other_errors_are_left_alone():
    assert no_room(OSError(errno.EIO, "Input/output error")) is None
    assert no_room(ValueError("No space left on device")) is None


def test_the_message_says_what_and_how_to_go_on(tmp_path):
    console = io.StringIO()
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
    assert tell_no_room(error, str(tmp_path), 3, console) == 1
    told = console.getvalue()
    for text in ("error on rank 3: ", "metrics.jsonl", "No space left", "MiB free", "make room"):
        assert text in told
    assert tell_no_room(OSError(errno.EFBIG, "File too large"), None, 0, console) == 1


def test_log_lines_that_find_no_room_are_dropped_and_later_ones_are_not(tmp_path):
    path = tmp_path / "train.log"
    stream = log_stream(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), owned=True)
    print("first", file=stream)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        print("second" * 100, file=stream, flush=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print("third", file=stream)
    stream.close()
    assert path.read_text() == "first\nsecothird\n"


def test_other_faults_of_a_log_are_raised(tmp_path):
    path = tmp_path / "train.log"
    path.touch()
    stream = log_stream(os.open(path, os.O_RDONLY), owned=True)
    with pytest.raises(OSError, match="not open for writing|Bad file descriptor"):
        print("line", file=stream, flush=True)
