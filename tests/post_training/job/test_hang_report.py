import sys

import pytest

from post_training.job.hang_report import hang_report, place_of
from tests.helpers.launch import ROOT


@pytest.mark.parametrize(
    ("states", "lines"),
    [
        (  # within the step
            [(5, 9, 0), (5, 8, 0)],
            ["rank 1 has come least far:", "  rank 1 at step 5: f", "  rank 0 at step 5: f"],
        ),
        (  # the last to begin the step
            [(5, 9, 0), (4, 9, 0)],
            ["rank 1 has come least far:", "  rank 1 at step 4: f", "  rank 0 at step 5: f"],
        ),
        (  # in the middle, who waits for the last; both are behind the first
            [(5, 9, 0), (5, 8, 0), (5, 7, 0)],
            ["rank 2 has come least far:", "  rank 2 at step 5: f", "  ranks 0, 1 at step 5: f"],
        ),
        (  # two that have come equally far
            [(5, 9, 0), (5, 7, 0), (5, 7, 0)],
            [
                "ranks 1, 2 have come least far:",
                "  ranks 1, 2 at step 5: f",
                "  rank 0 at step 5: f",
            ],
        ),
        (  # a later stage has done less because it waits
            [(5, 9, 0), (5, 8, 1)],
            ["all ranks have come equally far:", "  ranks 0, 1 at step 5: f"],
        ),
        (  # it has not said where it stands
            [(5, 9, 0), None],
            [
                "rank 1 does not answer:",
                "  rank 1 was not seen: its process is stopped, or its machine is gone",
                "  rank 0 at step 5: f",
            ],
        ),
    ],
)
def test_the_rank_that_has_come_least_far_is_named(states, lines):
    noted: dict[int, dict[str, object]] = {}
    for rank, state in enumerate(states):
        noted[rank] = {}
        if state is not None:
            phases, beats, stage = state
            noted[rank] |= {"phase": f"at step {phases}", "place": "f"}
            noted[rank] |= {"phases": phases, "beats": beats, "stage": stage}
    assert hang_report(noted).splitlines() == lines


def test_places():
    place = place_of(sys._getframe())
    assert place.startswith("test_places (tests/post_training/job/test_hang_report.py:")
    assert str(ROOT) not in place
    assert place_of(None) == "an unknown place"
