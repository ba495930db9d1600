import sys

from post_training.job.hang_report import hang_report, place_of
from tests.helpers.launch import ROOT


def test_who_does_not_answer_is_named_and_where_the_others_stand():
    noted: dict[int, dict[str, object]] = {
        rank: {"phase": "at step 5", "place": "g" if rank == 2 else "f"} for rank in range(4)
    }
    places = ["  rank 2 at step 5: g", "  ranks 0, 1, 3 at step 5: f"]
    assert hang_report(noted).splitlines() == ["All ranks answer:", *places]
    noted |= {4: {}, 5: {"phase": "at step 4"}}
    assert hang_report(noted).splitlines() == [
        "No answer of ranks 4, 5:",
        "  rank 4 was not seen: its process is stopped, or its machine is gone",
        "  rank 5 was at step 4: its process is stopped, or its machine is gone",
        *places,
    ]


def test_places():
    place = place_of(sys._getframe())
    assert place.startswith("test_places (tests/post_training/job/test_hang_report.py:")
    assert str(ROOT) not in place
    assert place_of(None) == "an unknown place"
