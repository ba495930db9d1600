import pytest

from post_training.hang_report import who_hangs


@pytest.mark.parametrize(
    ("states", "lines"),
    [
        (  # rank 0 waits where no list of lines knows it: for room in the GPU's queue
            [(5, 9, 0, False), (5, 8, 0, False)],
            ["rank 1 is behind it:", "  rank 1 hangs at step 5: f", "  rank 0 waits at step 5: f"],
        ),
        (  # the last to begin the step, wherever it stands
            [(5, 9, 0, False), (4, 9, 0, True)],
            [
                "rank 1 is behind it:",
                "  rank 1 has come least far, at step 4: f",
                "  rank 0 waits at step 5: f",
            ],
        ),
        (  # in the middle, who waits for the last; both are behind the first
            [(5, 9, 0, True), (5, 8, 0, True), (5, 7, 0, False)],
            [
                "rank 2 is behind it:",
                "  rank 2 hangs at step 5: f",
                "  ranks 0, 1 wait at step 5: f",
            ],
        ),
        (  # of two that have come equally far
            [(5, 9, 0, True), (5, 7, 0, True), (5, 7, 0, False)],
            [
                "rank 2 seems to be behind it:",
                "  rank 2 hangs at step 5: f",
                "  ranks 0, 1 wait at step 5: f",
            ],
        ),
        (  # a later stage has done less because it waits
            [(5, 9, 0, False), (5, 8, 1, True)],
            [
                "rank 0 seems to be behind it:",
                "  rank 0 hangs at step 5: f",
                "  rank 1 waits at step 5: f",
            ],
        ),
        (
            [(5, 9, 0, True), (5, 8, 1, True)],
            ["all ranks wait for each other", "  ranks 0, 1 wait at step 5: f"],
        ),
        (  # it has not said where it stands
            [(5, 9, 0, False), None],
            [
                "rank 1 is behind it:",
                "  rank 1 does not answer: its process is stopped, or its machine is gone; it was not seen",
                "  rank 0 waits at step 5: f",
            ],
        ),
    ],
)
def test_the_rank_that_has_come_least_far_is_named(states, lines):
    noted: dict[int, dict[str, object]] = {}
    for rank, state in enumerate(states):
        noted[rank] = {}
        if state is not None:
            phases, beats, stage, waits = state
            noted[rank] |= {"phase": f"at step {phases}", "place": "f", "waits": waits}
            noted[rank] |= {"phases": phases, "beats": beats, "stage": stage}
    assert who_hangs(noted).splitlines() == lines
