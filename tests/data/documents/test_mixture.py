from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents.mixture import mix_documents, shared_documents, split_documents, sum_reports
from data.errors import DataError
from data.packs.dataset import SFTDataset
from data.prepare.prepare import prepare_rows
from tests.data.conftest import make_rows


@pytest.fixture(scope="module")
def parts(tokenizer):
    return [
        prepare_rows(make_rows(count, seed), tokenizer=tokenizer, seq_length=256)
        for count, seed in ((150, 0), (50, 1), (90, 2))
    ]


@given(st.lists(st.floats(0.05, 10), min_size=3, max_size=3), st.integers(0, 3))
def test_mixture_has_the_wanted_shares_and_repeats_nothing(parts, weights, seed):
    mixture = mix_documents(parts, weights, ["a", "b", "c"], seed)
    pairs = list(zip(mixture.part_of.tolist(), mixture.index_of.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    longest = max(part.lengths.max() for part in parts)
    for name, weight in zip("abc", weights, strict=True):
        entry = mixture.report["mixture"][name]
        assert entry["weight"] == pytest.approx(weight / sum(weights))
        # No closer than one document can bring it.
        assert abs(entry["achieved"] - entry["weight"]) <= 3 * longest / mixture.lengths.sum()


def test_mixture_uses_the_scarcest_source_up(parts):
    mixture = mix_documents(parts, [1, 1, 1], ["a", "b", "c"], 0)
    assert mixture.report["mixture"]["b"]["documents"] == len(parts[1])


def test_sets_are_read_like_documents(parts, tokenizer):
    mixture = mix_documents(parts, [1, 2, 1], ["a", "b", "c"], 0)
    dataset = SFTDataset(None, mixture, tokenizer, 256)
    assert sum(map(len, (dataset.document_indices(i) for i in range(len(dataset))))) == len(mixture)
    part, index = int(mixture.part_of[-1]), int(mixture.index_of[-1])
    assert np.array_equal(mixture[len(mixture) - 1][0], parts[part][index][0])
    assert mixture.provenance.shape == (len(mixture), 2)
    assert mixture.max_token_id == max(part.max_token_id for part in parts)


def test_contents_are_those_of_the_parts_and_what_was_chosen(parts, tokenizer):
    names = ["a", "b", "c"]
    mixture = mix_documents(parts, [1, 2, 1], names, 0)
    assert mixture.contents == mix_documents(parts, [2, 4, 2], ["x", "y", "z"], 0).contents
    others = [
        mix_documents(parts, [1, 2, 1], names, 1),
        mix_documents(parts, [1, 2, 2], names, 0),
        *split_documents(parts[0], [8, 1, 1]),
        replace(mixture, parts=[parts[0], parts[1], parts[0]]),
        replace(mixture, part_of=mixture.part_of[::-1], index_of=mixture.index_of[::-1]),
    ]
    seen = {each.contents for each in (*others, mixture, *parts)}
    assert len(seen) == len(others) + 1 + len(parts)


def test_contents_of_a_set_are_those_of_the_same_documents(parts, tokenizer):
    """All of one source, and the part of a split that added rows have not fallen into."""
    assert mix_documents(parts[:1], [3], ["a"], 0).contents == parts[0].contents
    rows = make_rows(40)
    before, after = (
        split_documents(prepare_rows(each, tokenizer=tokenizer, seq_length=256), [8, 1, 1])
        for each in (rows, [*rows, *make_rows(1, 9)])
    )
    same = [old.contents == new.contents for old, new in zip(before, after, strict=True)]
    assert sorted(same) == [False, True, True]


def test_split_does_not_move_documents_when_data_is_added(tokenizer):
    few, more = (
        prepare_rows(make_rows(n), tokenizer=tokenizer, seq_length=256) for n in (100, 160)
    )
    first, second = (
        [{part[i][0].tobytes() for i in range(len(part))} for part in split_documents(d, [8, 1, 1])]
        for d in (few, more)
    )
    assert all(old <= new for old, new in zip(first, second, strict=True))


def test_shared_documents_are_found_in_mixtures_with_their_likes(parts, tokenizer):
    rows = make_rows(40, 0) + make_rows(9, 5)  # the first 40 of parts[0], and none of theirs
    held_out = prepare_rows(rows, tokenizer=tokenizer, seq_length=256)
    mixture = mix_documents(parts, [1, 2, 1], ["a", "b", "c"], 0)
    expected = {
        (i, mixture[j][0].tobytes())
        for i in range(len(held_out))
        for j in range(len(mixture))
        if np.array_equal(held_out[i][0], mixture[j][0])
    }
    assert 0 < len(expected) < 40
    shared, like = shared_documents(held_out, mixture)
    assert {(i, mixture[j][0].tobytes()) for i, j in zip(shared, like, strict=True)} == expected
    shared, like = shared_documents(parts[1], mixture)
    assert shared.tolist() == list(range(len(parts[1])))
    for i, j in zip(shared, like, strict=True):
        assert np.array_equal(parts[1][i][0], mixture[j][0])
    train, valid, _ = split_documents(parts[0], [8, 1, 1])
    assert not len(shared_documents(valid, train)[0])
    assert not len(shared_documents(split_documents(parts[0], [1, 0])[1], train)[0])


@pytest.mark.parametrize("ratios", [[], [0, 0], [-1, 2]])
def test_impossible_ratios_are_refused(parts, ratios):
    with pytest.raises(DataError, match="--split-ratio"):
        split_documents(parts[0], ratios)


def test_reports_are_summed_by_reason():
    first = {"read": 2, "dropped": {"x": 1}, "max_token_id": 5, "format": "a", "bad_rows": [1]}
    second = {"read": 3, "dropped": {"x": 1, "y": 2}, "max_token_id": 3, "format": "b"}
    total = sum_reports([first, second])
    assert (total["read"], total["dropped"], total["max_token_id"]) == (5, {"x": 2, "y": 2}, 5)
