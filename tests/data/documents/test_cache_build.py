import contextlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import data.sources.readers
from data.documents import cache_folder
from data.documents.cache_build import JOURNAL, FolderSink, feed
from data.documents.documents import open_documents
from data.documents.shard import Shard
from data.errors import DataError
from data.prepare.prepare import prepare_documents
from tests.data.conftest import make_rows
from tests.helpers.launch import forkserver


def shard(number, documents=3):
    lengths = np.array([number + 1 + i for i in range(documents)], np.int64)
    total = int(lengths.sum())
    return Shard(
        input_ids=np.arange(total, dtype=np.int32) + 1000 * number,
        loss_mask=np.full(total, number % 2, np.uint8),
        lengths=lengths,
        provenance=np.array([[0, 10 * number + i] for i in range(documents)], np.int64),
        hashes=np.arange(documents, dtype=np.uint64) + np.uint64(number),
        counts={"read": documents + 1, "kept": documents, "dropped: x": 1, "max token id": number},
        bad_rows=[(f"f:{number}", "x", "y")],
    )


def build(folder, target, count, stop_after=None):
    sink = FolderSink(folder)
    for number in range(sink.finished.done, count):
        if stop_after is not None and number == stop_after:
            sink.close()
            return sink
        sink.add(shard(number))
    sink.publish(target, "key", {})
    return sink


@pytest.fixture
def reference(tmp_path):
    build(tmp_path / "ref.building", tmp_path / "ref", 9)
    return contents(tmp_path / "ref")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_published_folder_holds_all_shards_and_counts(tmp_path):
    build(tmp_path / "a.building", tmp_path / "a", 5)
    documents = open_documents(tmp_path / "a")
    assert len(documents) == 15
    for number in range(5):
        ids, mask = documents[3 * number + 1]
        assert len(ids) == number + 2
        assert set(mask.tolist()) == {number % 2}
    assert documents.report["read"] == 20
    assert documents.report["dropped"] == {"x": 5}
    assert documents.max_token_id == 4
    assert not (tmp_path / "a.building").exists()


@pytest.mark.parametrize("stop", range(9))
def test_stopped_build_goes_on_after_the_last_shard(tmp_path, reference, stop):
    folder = tmp_path / "a.building"
    build(folder, tmp_path / "a", 9, stop_after=stop)
    assert FolderSink(folder).finished.done == stop
    build(folder, tmp_path / "a", 9)
    assert contents(tmp_path / "a") == reference


@pytest.mark.parametrize("name", ["input_ids.bin", "loss_mask.bin", "lengths.bin", "journal.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "grown", "flipped"])
def test_half_written_and_damaged_shards_are_done_again(tmp_path, reference, name, damage):
    folder = tmp_path / "a.building"
    build(folder, tmp_path / "a", 9, stop_after=6)
    path = folder / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) - 5])
    elif damage == "grown":
        path.write_bytes(data + b"\x01\x02\x03")
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    build(folder, tmp_path / "a", 9)
    assert contents(tmp_path / "a") == reference


@pytest.mark.parametrize(
    "line", ["[]", "7", "null", "{}", '{"sizes": 3, "counts": {}, "crc32": 0}', "[" * 100_000]
)
def test_a_journal_of_something_else_begins_anew(tmp_path, reference, line):
    folder = tmp_path / "a.building"
    folder.mkdir()
    (folder / JOURNAL).write_text(line + "\n")
    build(folder, tmp_path / "a", 9)
    assert contents(tmp_path / "a") == reference


def test_error_in_a_shard_stops_and_keeps_what_was_done(tmp_path):
    sink = FolderSink(tmp_path / "a.building")
    bad = shard(1)
    bad.error = "f:1: bad row"
    with pytest.raises(DataError, match="f:1: bad row"):
        feed(sink, iter([shard(0), bad, shard(2)]))
    sink.close()
    assert FolderSink(tmp_path / "a.building").finished.done == 1


def test_full_disk_is_one_clear_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    sink = FolderSink(tmp_path / "a.building")
    sink._files["loss_mask.bin"].close()
    with open("/dev/full", "wb", buffering=0) as full:
        sink._files["loss_mask.bin"] = full  # type: ignore[assignment]
        with pytest.raises(DataError, match="--data-cache-dir: cannot write.*No space left"):
            feed(sink, iter([shard(0)]))


@pytest.mark.parametrize("name", ["input_ids.bin", "manifest.json", "offsets.bin"])
def test_damaged_cache_is_refused_by_name(tmp_path, name):
    build(tmp_path / "a.building", tmp_path / "a", 2)
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="emove .* and run again"):
        open_documents(tmp_path / "a")


@pytest.mark.parametrize("step", ["fsync", "rename", "unlink"])
def test_publishing_that_is_interrupted_loses_nothing(tmp_path, reference, monkeypatch, step):
    folder, target = tmp_path / "a.building", tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(os if step != "unlink" else Path, step, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(folder, target, 9)
    if step == "unlink":  # it has its name by then, and whoever sees it can use it
        assert len(open_documents(target)) == 27
    else:
        assert not target.exists()
        assert FolderSink(folder).finished.done == 9
        build(folder, target, 9)
        assert contents(target) == reference


def _interrupt(*_):
    raise KeyboardInterrupt


def test_folder_that_somebody_else_wrote_into_is_not_published(tmp_path):
    folder = tmp_path / "a.building"
    first = FolderSink(folder)
    first.add(shard(0))
    second = FolderSink(folder)
    for sink in (first, second, first, second):
        sink.add(shard(sink.finished.done))
    for sink in (first, second):
        with pytest.raises(DataError, match="written by two processes at once"):
            sink.publish(tmp_path / "a", "key", {})
    assert not (tmp_path / "a").exists()


def test_a_journal_that_two_processes_wrote_is_good_up_to_where_they_met(tmp_path, reference):
    folder = tmp_path / "x.building"
    build(folder, tmp_path / "x", 9, stop_after=4)
    lines = (folder / JOURNAL).read_text().splitlines(keepends=True)
    (folder / JOURNAL).write_text("".join([*lines[:3], lines[0], lines[3]]))
    assert FolderSink(folder).finished.done == 3
    build(folder, tmp_path / "x", 9)
    assert contents(tmp_path / "x") == reference


CHUNK_BYTES = 3000

# Builds in processes of their own, which are forked from one that has everything imported.


def start(source, cache, workers=0, name=None, locks=True, killed=None):
    """A build; `killed` says when it is killed, as for `_kill_self`."""
    process = forkserver().Process(
        target=_build_here, args=(*source, cache, workers, name, locks, killed)
    )
    process.start()
    return process


def _kill_self(shards, seconds, latest):
    """End this process `seconds` after its build has come to `shards`, and before it is beyond `latest`.

    It does so itself: somebody who looks on from outside may be too late on a busy machine.
    """
    add, timer = FolderSink.add, threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def adds(sink, shard):
        if sink.finished.done >= latest:
            os.kill(os.getpid(), signal.SIGKILL)
        if sink.finished.done >= shards and not timer.ident:
            timer.start()
        add(sink, shard)

    setattr(FolderSink, "add", adds)  # noqa: B010


def _build_here(path, tokenizer, cache, workers, name, locks, killed):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data.sources.readers.CHUNK_BYTES = CHUNK_BYTES
    if killed is not None:
        _kill_self(*killed)
    if name is not None:
        setattr(cache_folder, "machine", lambda: name)  # noqa: B010
    if not locks:
        setattr(cache_folder, "FileLock", lambda path: contextlib.nullcontext())  # noqa: B010
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    try:
        prepare_documents(
            files=[path], tokenizer=tokenizer, seq_length=256, cache_dir=cache, workers=workers
        )
    except DataError as error:
        sys.exit(f"DataError: {error}")


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """Arguments of builds of 20 000 rows, and the cache that comes out undisturbed."""
    folder = tmp_path_factory.mktemp("source")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(20_000)))
    tokenizer.save_pretrained(folder / "tokenizer")
    arguments = (str(path), str(folder / "tokenizer"))
    process = start(arguments, str(folder / "whole"))
    process.join()
    assert process.exitcode == 0
    (whole,) = (p for p in (folder / "whole").iterdir() if p.is_dir())
    return arguments, whole


def shards_done(cache):
    journals = cache.glob("*.building-*/journal.jsonl")
    return max((path.read_bytes().count(b"\n") for path in journals), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_builds_killed_at_20_random_moments_lose_nothing(source, tmp_path, workers):
    arguments, whole = source
    shards = -(-Path(arguments[0]).stat().st_size // CHUNK_BYTES)
    rng = random.Random(workers)
    kills = []
    for moment in sorted(rng.random() * 0.95 for _ in range(20)):
        done = int(moment * shards)
        killed = (done, rng.random() * 0.01, done + shards // 50)
        process = start(arguments, str(tmp_path), workers, killed=killed)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills.append(shards_done(tmp_path))
        # Nothing that was finished is lost, and what is not finished has no name.
        assert kills == sorted(kills)
        assert not (tmp_path / whole.name).exists()
    print(f"workers {workers}: killed after {kills} of {shards} shards")
    assert len(set(kills)) > 10
    process = start(arguments, str(tmp_path), workers)
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / whole.name) == contents(whole)
    assert len(open_documents(tmp_path / whole.name)) == 20_000
    assert not list(tmp_path.glob("*.building-*"))


@pytest.mark.slow
def test_machines_that_do_not_see_each_other_s_locks_publish_one_right_cache(source, tmp_path):
    arguments, whole = source
    machines = [
        start(arguments, str(tmp_path), 0, name, locks=False) for name in ("one", "two", "three")
    ]
    for process in machines:
        process.join()
    assert [process.exitcode for process in machines] == [0, 0, 0]
    assert contents(tmp_path / whole.name) == contents(whole)
    assert not list(tmp_path.glob("*.building-*"))


@pytest.mark.slow
def test_processes_of_one_machine_without_locks_never_publish_a_bad_cache(source, tmp_path):
    arguments, whole = source
    processes = [start(arguments, str(tmp_path), 0, "one", locks=False) for _ in range(3)]
    for process in processes:
        process.join()
    print("exit codes", [process.exitcode for process in processes])
    if (tmp_path / whole.name).exists():
        assert contents(tmp_path / whole.name) == contents(whole)
    process = start(arguments, str(tmp_path))  # alone, whatever they left is put right
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / whole.name) == contents(whole)


@pytest.mark.slow
def test_build_killed_on_one_machine_goes_on_on_another(source, tmp_path):
    arguments, whole = source
    process = start(arguments, str(tmp_path), 0, "one", killed=(300, 3600, 300))
    process.join()
    assert shards_done(tmp_path) == 300
    (left,) = tmp_path.glob("*.building-one")
    journal = (left / JOURNAL).read_bytes()
    # Before it adds anything, unless it begins anew.
    process = start(arguments, str(tmp_path), 0, "two", killed=(1, 3600, 1))
    process.join()
    other = left.with_name(left.name.replace("-one", "-two")) / JOURNAL
    assert other.read_bytes() == journal
    process = start(arguments, str(tmp_path), 0, "three")
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / whole.name) == contents(whole)
    assert not list(tmp_path.glob("*.building-*"))
