import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors import safe_open

from data.errors import DataError
from data.features import reader as reader_module
from data.features.dataset import open_features
from data.features.reader import FeatureReader, require_made_by
from data.features.writer import FeatureWriter
from tests.data.features.folders import (
    FIELDS,
    MADE_BY,
    SHARD_BYTES,
    make_documents,
    shard_tensors,
    states,
    write,
)


@pytest.fixture(scope="module")
def documents():
    return make_documents()


@pytest.fixture(scope="module")
def written(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write(folder / "train", documents)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy") / "train"


def test_every_document_gives_its_own_rows_in_any_order_and_from_threads(documents, written):
    features = FeatureReader(written / "train")
    assert features.documents.contents == documents.contents
    order = [*range(len(documents))] * 2
    with ThreadPoolExecutor(8) as pool:
        for document, rows in zip(order, pool.map(features.read, order), strict=True):
            assert rows.keys() == {field.name for field in FIELDS}
            for field in FIELDS:
                assert torch.equal(rows[field.name], states(documents, document, field))
    assert features.read(3, ["topk_ids"]).keys() == {"topk_ids"}
    for outside in (-1, len(documents)):
        with pytest.raises(IndexError):
            features.read(outside)


def test_only_the_rows_of_the_document_are_read(documents, written, monkeypatch):
    """Of the files that hold it, and of the fields that are asked for."""
    opened, cut = [], []

    class Slice:
        def __init__(self, name, part):
            self.name, self.part = name, part

        def __getitem__(self, key):
            cut.append((self.name, key.stop - key.start))
            return self.part[key]

        def get_shape(self):
            return self.part.get_shape()

    class File:
        def __init__(self, path, framework):
            opened.append(path.name)
            self.file = safe_open(path, framework)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Slice(name, self.file.get_slice(name))

    monkeypatch.setattr(reader_module, "safe_open", File)
    features = FeatureReader(written / "train")
    assert opened == []
    last = len(documents) - 1
    rows = features.read(last, ["hidden_states", "topk_ids"])
    assert opened == [features.manifest.shards[-1].file]
    assert cut == [(name, len(rows[name])) for name in ("hidden_states", "topk_ids")]
    # What is returned is the mapped file itself, at the place of the document.
    shard = rows["hidden_states"].untyped_storage().nbytes()
    assert shard == features.manifest.shards[-1].tokens * features.fields["hidden_states"].row_bytes


def test_large_folders_are_checked_file_by_file(copied, monkeypatch):
    monkeypatch.setattr(reader_module, "CHECKED_WHEN_OPENED", 100)
    features = FeatureReader(copied)
    flip(copied / features.manifest.shards[1].file)
    assert len(features.read(0)) == len(FIELDS)
    with pytest.raises(DataError, match=r"features-00001-of-\d+.safetensors: changed or damaged"):
        features.read(features.manifest.shards[1].first_document)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard_file(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def edit(folder, **values):
    """As a version without a check sum of the manifest might have written it."""
    path = folder / "manifest.json"
    found = {**json.loads(path.read_text()), **values}
    del found["crc32"]
    path.write_text(json.dumps(found))


def change_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"first_document": 0', '"first_document": 1'))


BAD: dict[str, Any] = {
    "missing file": (lambda f: shard_file(f).unlink(), "safetensors: is missing; .* were written"),
    "cut file": (
        lambda f: shard_file(f).write_bytes(shard_file(f).read_bytes()[:-7]),
        r"safetensors: has [\d,]+ bytes; [\d,]+ bytes were written",
    ),
    "changed number": (lambda f: flip(shard_file(f)), "safetensors: changed or damaged"),
    "changed header": (lambda f: flip(shard_file(f), 20), "safetensors: changed or damaged"),
    "changed token": (lambda f: flip(f / "documents/input_ids.bin"), "input_ids.bin: changed"),
    "changed mask": (lambda f: flip(f / "documents/loss_mask.bin"), "loss_mask.bin: changed"),
    "no documents": (lambda f: shutil.rmtree(f / "documents"), "documents/bad_rows.*: is missing"),
    "other documents": (lambda f: edit(f, contents="x"), "documents are others than the features"),
    "another format": (lambda f: edit(f, format=99), "format 99; this version reads 1"),
    "changed manifest": (change_manifest, "manifest.json: not the .* by its own check sum"),
    "manifest cut": (
        lambda f: (f / "manifest.json").write_text("{"),
        r"manifest.json: not the manifest of a folder of features \(JSONDecodeError",
    ),
    "manifest of something else": (
        lambda f: (f / "manifest.json").write_text("[]"),
        "manifest.json: not the manifest of a folder of features",
    ),
    "manifest without shards": (
        lambda f: (f / "manifest.json").write_text('{"format": 1}'),
        "manifest.json: not the manifest of a folder of features",
    ),
    "shards of something else": (
        lambda f: edit(f, shards=[{"file": "x"}]),
        "manifest.json: not the manifest of a folder of features",
    ),
    "no split": (shutil.rmtree, "train: no such folder of features; .*copy has none"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "train: holds no features, neither"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_message(copied, case):
    damage, message = BAD[case]
    damage(copied)
    with pytest.raises(DataError, match=message) as caught:
        open_features(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_splits_that_are_there_are_named(written):
    with pytest.raises(DataError, match="valid: no such folder of features; .* has train. Extract"):
        open_features(written / "valid")
    with pytest.raises(DataError, match="holds the splits train; give the folder of one"):
        open_features(written)


def test_a_folder_that_is_being_written_says_how_far_it_is(documents, tmp_path):
    writer = FeatureWriter(tmp_path, documents, FIELDS, MADE_BY, SHARD_BYTES)
    for shard in (0, 2):
        writer.write(shard, shard_tensors(writer, shard))
        with pytest.raises(DataError, match=f"still being written, {shard // 2 + 1} files of"):
            open_features(tmp_path)


def test_files_that_do_not_hold_what_the_manifest_says_are_refused(copied):
    """Such as those of another run, with check sums and all."""
    fields = json.loads((copied / "manifest.json").read_text())["fields"]
    edit(copied, fields=[field for field in fields if field["name"] != "topk_ids"])
    with pytest.raises(DataError, match="safetensors: holds .*; by the manifest it is"):
        open_features(copied).read(0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"base": "b2"}, "base is 'b1' there and 'b2' here"),
        ({"tokenizer": "t2"}, "tokenizer is 't1' there and 't2' here"),
        ({"template": None}, "template is 'c1' there and None here"),
        ({"aux_layers": [0, 1, 3]}, r"aux_layers is \[0, 1, 2\] there and \[0, 1, 3\] here"),
        ({"hidden_size": 8}, "hidden_size is 4 there and 8 here"),
        ({"aux_hidden_size": 24}, "aux_hidden_size is 12 there and 24 here"),
        ({"revision": "r"}, "revision is None there and 'r' here"),
    ],
)
def test_features_of_another_base_are_refused_with_both(written, other, message):
    features = open_features(written / "train")
    same = {**MADE_BY, "hidden_size": 4, "aux_hidden_size": 12}
    require_made_by(features, same)
    with pytest.raises(DataError, match=f"made otherwise: {message}. Extract them again"):
        require_made_by(features, {**same, **other})
