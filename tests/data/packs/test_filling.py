from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packs.filling import best_fit_decreasing, fill_by_patterns, fill_packs, next_fit

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def best_fit_one_by_one(lengths, capacity):
    """The textbook algorithm: number of packs and their fills, one document at a time."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        slot = bisect_left(free, length)
        room = free.pop(slot) if slot < len(free) else capacity
        insort(free, room - length)
    return sorted(free)


@given(lengths_lists)
def test_best_fit_decreasing_equals_placing_one_by_one(lengths):
    pack_of, num_packs = best_fit_decreasing(np.array(lengths), 40)
    used = np.bincount(pack_of, weights=lengths, minlength=num_packs)
    assert sorted(40 - used) == best_fit_one_by_one(lengths, 40)


@pytest.mark.parametrize("leftovers", [0.0, 0.3])
@given(lengths=lengths_lists)
def test_patterns_place_every_document_within_capacity(leftovers, lengths):
    ordered = np.array(sorted(lengths, reverse=True))
    pack_of, num_packs = fill_by_patterns(ordered, 40, leftovers)
    used = np.bincount(pack_of, weights=ordered, minlength=num_packs)
    assert len(used) == num_packs
    assert used.min() >= 1
    assert used.max() <= 40


@given(lengths_lists, st.integers(0, 3))
def test_filling_depends_on_the_multiset_alone(lengths, seed):
    shuffled = np.random.default_rng(seed).permutation(lengths)
    first, second = fill_packs(np.array(lengths), 40), fill_packs(shuffled, 40)
    assert first[1] == second[1]
    assert np.array_equal(first[0], second[0])


def test_short_chats_leave_less_than_a_thousandth_empty():
    # Lengths like those of short chats: none under 4% of a pack.
    lengths = np.random.default_rng(0).normal(190, 60, 75_000).astype(np.int64).clip(80, 550)
    _, best_fit = best_fit_decreasing(-np.sort(-lengths), 2048)
    _, found = fill_packs(lengths, 2048)
    assert lengths.sum() / (best_fit * 2048) < 0.995
    assert lengths.sum() / (found * 2048) > 0.999


def test_next_fit_opens_a_pack_when_the_next_document_does_not_fit():
    pack_of, num_packs = next_fit(np.array([3, 3, 5, 2, 8]), 8)
    assert pack_of.tolist() == [0, 0, 1, 1, 2]
    assert num_packs == 3
