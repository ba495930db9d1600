from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from post_training.hf_models.packing import MOST_CALLS, PADDED, Rows, by_length, wanted_calls

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=7)


def area(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[n] for n in group) for group in groups if group)


def cuts(order: list[int], count: int) -> list[list[list[int]]]:
    """Every way to cut a list in so many parts."""
    if count == 1:
        return [[order]]
    return [
        [order[:at], *rest] for at in range(1, len(order)) for rest in cuts(order[at:], count - 1)
    ]


@given(LENGTHS, st.integers(1, 4))
def test_groups_of_like_length_waste_least(lengths, calls):
    groups = by_length(lengths, calls)
    assert len(groups) == calls
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    every = cuts(order, min(calls, len(lengths)))
    assert area(groups, lengths) == min(area(cut, lengths) for cut in every)


@given(LENGTHS)
def test_no_more_calls_than_padding_is_worth(lengths):
    calls = wanted_calls(lengths)
    waste = [area(by_length(lengths, n), lengths) / sum(lengths) for n in range(1, calls + 1)]
    assert calls == MOST_CALLS or waste[-1] <= PADDED
    assert all(earlier > PADDED for earlier, _ in pairwise(waste))


def test_rows_are_padded_with_their_own_last_token():
    rows = Rows.of([2, 0], [3, 2, 5])
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 2, 2]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert Rows.of([], [3]).tokens.tolist() == [[0]]
