"""Killed at any moment: nothing is lost that was whole. `python tests/runs/kills.py --table` tells more."""

import os

import pytest

from tests.runs.kills import RUNS, Kill, Killed

pytestmark = pytest.mark.slow


def test_twenty_kills(tmp_path):
    # Other moments: KILL_SEED=7 pytest tests/runs/test_kills.py
    seed = int(os.environ.get("KILL_SEED", "1234"))
    print(f"seed {seed}")
    killed = Killed(tmp_path, seed)
    told: list[Kill] = []
    same = [killed.kill(name, told.append) for name in RUNS]
    for kill in told:
        print(kill.line())
    assert len(told) == 20
    assert all(kill.right for kill in told)
    assert sum(kill.cut_off != "-" for kill in told) >= 10, "inside saves"
    assert all(same), "steps and weights of the runs that were not killed"
