import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.documents.documents import open_documents
from data.documents.mixture import DocumentSet, mix_documents, split_documents
from data.documents.provenance import document_place
from data.errors import DataError
from data.features.manifest import differences, estimate_bytes, hidden_fields, top_k_fields
from data.features.reader import FeatureReader
from data.features.writer import FeatureWriter
from tests.data.features.folders import (
    FIELDS,
    HIDDEN,
    MADE_BY,
    SHARD_BYTES,
    make_documents,
    shard_tensors,
    states,
    tree,
    write,
)
from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT


def writer_of(folder, documents, fields=FIELDS, made_by=MADE_BY, shard_bytes=SHARD_BYTES):
    return FeatureWriter(folder, documents, fields, made_by, shard_bytes)


@pytest.mark.slow
def test_killed_anywhere_and_gone_on_with_the_bytes_are_the_same(tmp_path):
    command = [sys.executable, "-m", "tests.data.features.kill_worker", str(tmp_path)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_processes_share_the_shards_and_none_is_written_twice(tmp_path):
    documents = make_documents()
    writers = [writer_of(tmp_path / "train", documents) for _ in range(3)]
    count = len(writers[0])
    assert count > 3
    with pytest.raises(DataError, match=f"shard 0 of {count} is not written yet"):
        writers[0].finish()
    for rank, writer in reversed(list(enumerate(writers))):
        for shard in writer.pending(range(rank, count, 3)):
            writer.write(shard, shard_tensors(writer, shard))
    assert writers[1].pending() == []
    manifest = writers[1].finish()
    assert [shard.documents for shard in manifest.shards] == [
        len(writers[0].documents_of(shard)) for shard in range(count)
    ]
    write(tmp_path / "alone" / "train", documents)
    assert tree(tmp_path / "train") == tree(tmp_path / "alone" / "train")


def test_a_shard_is_whole_documents_up_to_the_limit_and_longer_ones_alone(tmp_path):
    documents = make_documents()
    for limit in (1, 3000, 1 << 20):
        writer = write(tmp_path / str(limit), documents, shard_bytes=limit)
        shards = [writer.documents_of(shard) for shard in range(len(writer))]
        assert [d for shard in shards for d in shard] == list(range(len(documents)))
        sizes = [
            sum(writer.rows_of(shard, field.name) * field.row_bytes for field in FIELDS)
            for shard in range(len(writer))
        ]
        assert all(
            size <= limit or len(each) == 1 for size, each in zip(sizes, shards, strict=True)
        )
        reader = FeatureReader(tmp_path / str(limit))
        for document in range(len(documents)):
            last = FIELDS[-1]
            found = reader.read(document, [last.name])[last.name]
            assert torch.equal(found, states(documents, document, last))
    assert len(shards) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no note"])
def test_a_shard_that_is_not_what_was_written_is_pending(tmp_path, damage):
    documents = make_documents()
    writer = writer_of(tmp_path, documents)
    for shard in writer.pending():
        writer.write(shard, shard_tensors(writer, shard))
    path = tmp_path / f"features-00001-of-{len(writer):05}.safetensors"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        (path if damage == "gone" else path.with_suffix(".json")).unlink()
    again = writer_of(tmp_path, documents)
    assert again.pending() == [1]
    again.write(1, shard_tensors(again, 1))
    again.finish()
    assert path.read_bytes() == data


def test_a_finished_folder_is_left_alone_or_refused(tmp_path):
    documents = make_documents()
    write(tmp_path, documents)
    before = tree(tmp_path)
    again = writer_of(tmp_path, documents, shard_bytes=1 << 20)
    assert again.finished and again.pending() == []
    again.finish()
    assert tree(tmp_path) == before
    # What says of itself less, as a version before did, is taken by its readers and writers.
    more = {"architecture": {"num_layers": 2}, "computed_in": "bf16"}
    assert writer_of(tmp_path, documents, made_by=MADE_BY | more).finished
    for other, message in (
        ({"made_by": {**MADE_BY, "base": "b2"}}, "base is 'b1' there and 'b2' here. Give another"),
        ({"made_by": {**MADE_BY, "aux_layers": (0, 1, 3)}}, r"aux_layers is \[0, 1, 2\] there and"),
        ({"fields": FIELDS[:1]}, "field aux_hidden_states is '12 x fp32 per token' there and None"),
        ({"documents": make_documents(seed=1)}, "documents is '"),
    ):
        with pytest.raises(DataError, match=f"made otherwise: {message}"):
            writer_of(tmp_path, **{"documents": documents, **other})


def test_a_damaged_finished_folder_is_not_said_to_be_whole(tmp_path):
    write(tmp_path, make_documents())
    path = next(tmp_path.glob("features-*.safetensors"))
    data = path.read_bytes()
    for damaged, message in ((data[:-1], "bytes were written"), (data[:-1] + b"?", "check sum")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            writer_of(tmp_path, make_documents())


def test_values_with_names_are_compared_one_by_one():
    there, here = ({"architecture": {"layers": n, key: 1}} for n, key in ((2, "old"), (3, "new")))
    assert differences(there, here) == "layers is 2 there and 3 here"


def test_a_part_of_other_features_is_not_gone_on_with(tmp_path):
    documents = make_documents()
    first = writer_of(tmp_path / "train", documents)
    for other, message in (
        ({"made_by": {**MADE_BY, "template": "c2"}}, "template is 'c1' there and 'c2' here"),
        ({"shard_bytes": 999}, f"shard_bytes is {SHARD_BYTES} there and 999 here"),
        ({"documents": make_documents(seed=1)}, "documents is '"),
    ):
        with pytest.raises(
            DataError, match=f"a part of features that were made otherwise.*{message}"
        ):
            writer_of(tmp_path / "train", **{"documents": documents, **other})
    for shard in first.pending():
        first.write(shard, shard_tensors(first, shard))
    first.finish()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds something else \(notes.txt\)"):
        writer_of(tmp_path / "mine", documents)


def test_the_estimate_is_the_size_and_is_checked_before_anything_is_made(tmp_path, monkeypatch):
    documents = make_documents(300)
    estimate = estimate_bytes(documents, FIELDS)
    writer = write(tmp_path / "train", documents)
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert 0 <= sum(sizes.values()) - estimate <= 2048 * (len(writer) + 2)
    token = hidden_fields(64, "bf16")
    assert sum(field.row_bytes for field in token) + 5 == 8 * 64 + 5
    assert sum(field.row_bytes for field in top_k_fields(64, "bf16")) == 6 * 64 + 2
    usage = SimpleNamespace(free=estimate - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    gib = f"{estimate / 2**30:,.2f} GiB"
    with pytest.raises(DataError, match=f"take {gib} more, and .* GiB are free"):
        writer_of(tmp_path / "new" / "train", documents)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_writer_left_goes_when_its_shard_is_written(tmp_path):
    writer = writer_of(tmp_path, make_documents())
    left = [
        tmp_path / f"features-{shard:05}-of-{len(writer):05}.elsewhere-1.tmp" for shard in (1, 2)
    ]
    for path in left:
        path.write_bytes(b"half")
    assert writer.pending() == list(range(len(writer)))
    writer.write(1, shard_tensors(writer, 1))
    assert [path.exists() for path in left] == [False, True]  # the other may be being written
    for shard in writer.pending():
        writer.write(shard, shard_tensors(writer, shard))
    writer.finish()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_one_message_and_leaves_nothing_behind(tmp_path):
    writer = writer_of(tmp_path, make_documents())
    tensors = shard_tensors(writer, 0)
    name = f"features-00000-of-{len(writer):05}"
    (tmp_path / f"{name}.safetensors").mkdir()  # a file cannot take its place
    with pytest.raises(DataError, match=f"{name}.safetensors: cannot be written .*goes on where"):
        writer.write(0, tensors)
    assert not list(tmp_path.glob("*.tmp"))


def test_numbers_that_are_not_finite_are_refused_with_their_document(tmp_path):
    documents = make_documents()
    writer = writer_of(tmp_path, documents)
    for name, value in (
        ("hidden_states", float("inf")),
        ("aux_hidden_states", float("nan")),
        ("topk_logprobs", float("nan")),
    ):
        tensors = shard_tensors(writer, 1)
        tensors[name][-1, 0] = value
        last = [
            d for d in writer.documents_of(1) if len(states(documents, d, writer.fields[name]))
        ][-1]
        with pytest.raises(DataError, match=f"{name} of document {last} has numbers that are not"):
            writer.write(1, tensors)
    tensors = shard_tensors(writer, 1)
    tensors["topk_logprobs"][0, 0] = -torch.inf
    writer.write(1, tensors)
    with pytest.raises(ValueError, match="shard 1 is"):
        writer.write(1, {**tensors, "topk_ids": tensors["topk_ids"].long()})
    nothing: dict[str, Any]
    for nothing in ({"fields": []}, {"documents": split_documents(documents, [1, 0])[1]}):
        with pytest.raises(DataError, match="nothing to write: "):
            writer_of(tmp_path, **{"documents": documents, **nothing})


def test_mixtures_are_kept_with_their_documents_and_places(tmp_path):
    parts = [make_documents(30, seed, f"{seed}.jsonl") for seed in range(2)]
    mixture = mix_documents(parts, [1, 2], ["a", "b"], seed=3)
    held_out = split_documents(parts[1], [0.5, 0.5])[1]
    for name, documents in (("train", mixture), ("valid", held_out)):
        assert isinstance(documents, DocumentSet)
        write(tmp_path / name, documents)
        reader = FeatureReader(tmp_path / name)
        kept = open_documents(tmp_path / name / "documents")
        assert kept.contents == documents.contents == reader.documents.contents
        assert len(kept) == len(documents) > 5
        for index in range(len(kept)):
            assert document_place(kept, index) == document_place(documents, index)
            assert [part.tolist() for part in kept[index]] == [
                part.tolist() for part in documents[index]
            ]
            for field in FIELDS:
                expected = states(documents, index, field)
                assert torch.equal(reader.read(index)[field.name], expected)
        assert kept.max_token_id == 499
        assert json.loads((tmp_path / name / "manifest.json").read_text())["split"] == name


def test_every_dtype_comes_back_bit_for_bit_and_other_programs_read_the_files(tmp_path):
    from safetensors.torch import load_file

    documents = make_documents(12)
    for dtype in ("fp32", "bf16", "fp16"):
        fields = [*hidden_fields(HIDDEN, dtype), *top_k_fields(3, dtype)]
        writer = write(tmp_path / dtype, documents, fields, shard_bytes=1 << 20)
        (path,) = (tmp_path / dtype).glob("*.safetensors")
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
        found, expected = load_file(path), shard_tensors(writer, 0)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(found[name].dtype == expected[name].dtype for name in found)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
