"""Which ranks have come, told by files."""

import json
import os
import subprocess
import time

from post_training import arrivals
from post_training.processes import this_host


def test_a_rank_is_there_until_it_leaves(tmp_path):
    arrivals.arrive(tmp_path, 0)
    assert arrivals.missing(tmp_path, 3) == [1, 2]
    arrivals.arrive(tmp_path, 2)
    assert arrivals.missing(tmp_path, 3) == [1]
    arrivals.leave(tmp_path, 0)
    arrivals.leave(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_left_does_not_count(tmp_path):
    arrivals.arrive(tmp_path, 0)
    files = [tmp_path / arrivals.FOLDER / str(rank) for rank in (1, 2, 3)]
    gone = subprocess.Popen(["true"])
    gone.wait()
    files[0].write_text(json.dumps({"host": this_host(), "pid": gone.pid}))
    for file in files[1:]:
        file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    before = time.time() - 10 * arrivals.SPREAD
    os.utime(files[1], (before, before))
    assert arrivals.missing(tmp_path, 4) == [1, 2]
