"""What makes documents the same: their contents, wherever these lie."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from data.documents.cache_build import FolderSink, MemorySink
from data.documents.documents import Documents, open_documents
from data.errors import DataError
from tests.data.documents.test_cache_build import shard


def documents(ids=(5, 6, 7, 8), mask=(0, 1, 0, 1), offsets=(0, 2, 4)):
    count = len(offsets) - 1
    return Documents(
        input_ids=np.array(ids, np.int32),
        loss_mask=np.array(mask, np.uint8),
        offsets=np.array(offsets, np.int64),
        provenance=np.zeros((count, 2), np.int64),
        hashes=np.array([hash(ids[a:b]) for a, b in pairwise(offsets)], np.int64).view(np.uint64),
        fingerprint="f",
    )


@pytest.mark.parametrize(
    "change",
    [{"ids": (5, 6, 7, 9)}, {"mask": (0, 1, 1, 1)}, {"offsets": (0, 3, 4)}, {"ids": (7, 8, 5, 6)}],
    ids=["id", "mask", "length", "order"],
)
def test_contents_tell_documents_apart(change):
    assert documents(**change).contents != documents().contents


def test_contents_are_those_of_ids_masks_and_order_alone():
    first = documents()
    other = replace(first, provenance=first.provenance + 1, fingerprint="g", contents="")
    assert other.contents == first.contents


def test_a_cache_keeps_the_hash_of_its_contents(tmp_path):
    sink, memory = FolderSink(tmp_path / "a.building"), MemorySink()
    for number in range(4):
        sink.add(shard(number))
        memory.add(shard(number))
    sink.publish(tmp_path / "a", "key", {})
    kept = json.loads((tmp_path / "a/manifest.json").read_text())["contents"]
    assert kept == open_documents(tmp_path / "a").contents == memory.documents("").contents
    # A cache of a version before has none: it is read.
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    del manifest["contents"]
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    assert open_documents(tmp_path / "a").contents == kept


WHOLE: dict[str, object] = {
    "format": 2,
    "tokens": 0,
    "documents": 0,
    "fingerprint": "",
    "report": {},
}


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '{"format": 2}', "{", "null", "[" * 100_000, '"\\ud800'),
        *(
            json.dumps(WHOLE | {key: value})
            for key, value in (
                ("tokens", None),
                ("documents", "x"),
                ("documents", -1),
                ("tokens", True),
                ("fingerprint", 3),
                ("report", []),
                ("contents", None),
            )
        ),
    ],
    ids=lambda text: text[-40:],
)
def test_a_manifest_of_something_else_is_told_of(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="[Rr]emove the folder"):
        open_documents(tmp_path)
