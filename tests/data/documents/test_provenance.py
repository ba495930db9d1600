import json

import numpy as np
import pytest

from data import prepare_documents
from data.documents.mixture import mix_documents, split_documents
from data.documents.provenance import document_place, source_names, source_of
from tests.helpers.models import make_tokenizer
from tests.helpers.rows import make_rows, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files: 5 rows a line each, 4 rows in one array, 3 rows a line each."""
    folder = tmp_path_factory.mktemp("sources")
    rows = make_rows(12)
    (folder / "b.json").write_text(json.dumps(rows[5:9]))
    return [
        str(write_rows(folder / "a.jsonl", rows[:5])),
        str(folder / "b.json"),
        str(write_rows(folder / "c.jsonl", rows[9:])),
    ]


def prepared(*files):
    return prepare_documents(
        files=files, tokenizer=make_tokenizer(), seq_length=256, cache_dir=None
    )


def test_places_count_from_one(files):
    documents = prepared(*files)
    assert document_place(documents, 0) == f"{files[0]}:1"
    assert document_place(documents, 4) == f"{files[0]}:5"
    assert document_place(documents, 6) == f"{files[1]}, row 2"
    assert document_place(documents, 11) == f"{files[2]}:3"


def test_places_in_mixtures_and_splits(files):
    parts = [prepared(files[0]), prepared(files[2])]
    mixture = mix_documents(parts, [1.0, 1.0], ["a", "c"], seed=1)
    for index in range(len(mixture)):
        part, row = int(mixture.part_of[index]), int(mixture.index_of[index])
        assert document_place(mixture, index) == f"{files[0 if part == 0 else 2]}:{row + 1}"
    whole = prepared(*files)
    for split in split_documents(whole, [0.5, 0.5]):
        for index in range(len(split)):
            of_whole = int(split.index_of[index])
            assert document_place(split, index) == document_place(whole, of_whole)


def test_sources_of_several_files(files):
    documents = prepared(*files)
    of = source_of(documents, files)
    assert of is not None
    assert [of(index) for index in range(12)] == [0] * 5 + [1] * 4 + [2] * 3
    part = split_documents(documents, [0.5, 0.5])[0]
    of_part = source_of(part, files)
    assert of_part is not None
    assert [of_part(i) for i in range(len(part))] == [of(int(i)) for i in part.index_of]


def test_sources_of_a_mixture_are_its_entries(files):
    parts = [prepared(*files[:2]), prepared(files[2])]
    mixture = mix_documents(parts, [1.0, 1.0], ["ab", "c"], seed=1)
    of = source_of(mixture, ["folder/of/ab", files[2]])
    assert of is not None
    assert np.array_equal([of(i) for i in range(len(mixture))], mixture.part_of)


def test_one_source_is_not_told_apart(files):
    assert source_of(prepared(files[0]), files[:1]) is None


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (["x/sums.jsonl", "y/talk.v2.jsonl.gz"], ["sums", "talk.v2"]),
        (["x/train.jsonl", "y/train.jsonl"], ["x/train.jsonl", "y/train.jsonl"]),
        (["folder", "more/*.jsonl"], ["folder", "more/*.jsonl"]),
    ],
)
def test_names_are_short_and_different(entries, names):
    assert source_names(entries) == names
