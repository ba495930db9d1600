"""Progress or stop; a mistake is not retried."""

import pytest

from scripts.launchers.attempt import STATUS, attempt

PREPARED = {"outcome": "prepared", "folder": "out"}
COMPLETE = {"outcome": "complete"}


def end(seen, progress, run=(1, {}), *, prepare=0, health=0):
    """One start after others: how it ends, and the steps that were run."""
    ran = []

    def step(what, flags):
        ran.append(what)
        told = {} if progress is None else PREPARED | {"progress": progress}
        return {"prepare": (prepare, told), "health": (health, {}), "run": run}[what]

    return attempt(step, ["--lr", "1"], seen, lambda: None).verdict, ran


@pytest.mark.parametrize(
    ("seen", "progress", "stops"),
    [
        ([], 0, False),
        ([0], 0, False),  # once may be bad luck
        ([0, 0], 0, True),
        ([0, 0], 5, False),
        ([0, 5], 5, False),
        ([0, 5, 5], 5, True),
        ([5, 9], 5, True),  # the newest one turned out to be damaged, and nothing is newer
        ([0, 0], None, True),  # preparing fails each time
    ],
)
def test_two_restarts_without_a_newer_checkpoint_are_the_end(seen, progress, stops):
    verdict, ran = end(list(seen), progress, prepare=int(progress is None))
    assert verdict == ("no progress" if stops else "again")
    assert ("run" in ran) != stops


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        ((0, COMPLETE), "complete"),
        ((0, {"outcome": "stopped", "step": 5}), "again"),
        ((143, {"outcome": "refused"}), "refused"),  # another node's launcher was ended for it
        ((0, {}), "again"),  # nobody has said that it is complete
        ((143, {}), "again"),
    ],
)
def test_what_is_told_counts_and_not_the_status(run, verdict):
    assert end([], 0, run) == (verdict, ["prepare", "health", "run"])
    assert (STATUS[verdict] == 0) == (verdict == "complete")


def test_what_cannot_run_is_not_run():
    assert end([], None, prepare=2) == ("refused", ["prepare"])
    assert end([], 0, health=1) == ("again", ["prepare", "health"])
