from hypothesis import given
from hypothesis import strategies as st

from post_training.hf_models.packing import ALIKE, MOST_CALLS, Rows, by_length


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_documents_of_a_call_are_of_like_length(lengths):
    groups = by_length(lengths)
    assert len(groups) <= MOST_CALLS
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    # The last one takes all that is left.
    for group in groups[: MOST_CALLS - 1]:
        sizes = [lengths[number] for number in group]
        assert min(sizes) >= ALIKE * max(sizes)


def test_rows_are_padded_with_their_own_last_token():
    rows = Rows.of([2, 0], [3, 2, 5])
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 2, 2]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert Rows.of([], [3]).tokens.tolist() == [[0]]
