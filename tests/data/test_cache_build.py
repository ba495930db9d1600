import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data.cache_build import FolderSink, feed
from data.errors import DataError
from data.row_tokenizer import Shard
from data.token_cache import open_documents
from tests.data.conftest import make_rows


def shard(number, documents=3):
    lengths = np.array([number + 1 + i for i in range(documents)], np.int64)
    total = int(lengths.sum())
    return Shard(
        input_ids=np.arange(total, dtype=np.int32) + 1000 * number,
        loss_mask=np.full(total, number % 2, np.uint8),
        lengths=lengths,
        provenance=np.array([[0, 10 * number + i] for i in range(documents)], np.int64),
        counts={"read": documents + 1, "kept": documents, "dropped: x": 1, "max token id": number},
        bad_rows=[(f"f:{number}", "x", "y")],
    )


def build(folder, target, count, stop_after=None):
    sink = FolderSink(folder)
    for number in range(sink.done, count):
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
    assert FolderSink(folder).done == stop
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


def test_error_in_a_shard_stops_and_keeps_what_was_done(tmp_path):
    sink = FolderSink(tmp_path / "a.building")
    bad = shard(1)
    bad.error = "f:1: bad row"
    with pytest.raises(DataError, match="f:1: bad row"):
        feed(sink, iter([shard(0), bad, shard(2)]))
    sink.close()
    assert FolderSink(tmp_path / "a.building").done == 1


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


BUILD = """
import sys
from transformers import AutoTokenizer
import data.sources
data.sources.CHUNK_BYTES = 3000
from data.prepare import prepare_documents
prepare_documents(files=[sys.argv[1]], tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]),
                  seq_length=256, cache_dir=sys.argv[3], workers=int(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_builds_killed_at_random_moments_lose_nothing(tokenizer, tmp_path, workers):
    rows = make_rows(20_000)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", BUILD, str(path), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TOKENIZERS_PARALLELISM": "false"}

    def start(cache):
        arguments = [*command, str(tmp_path / cache), str(workers)]
        return subprocess.Popen(arguments, env=environment, start_new_session=True)

    assert start("whole").wait() == 0
    whole = next(p for p in (tmp_path / "whole").iterdir() if p.is_dir())
    rng, progress = random.Random(0), [0]
    for _ in range(10):
        process = start("killed")
        journal = tmp_path / "killed" / f"{whole.name}.building" / "journal.jsonl"
        before = progress[-1]
        # From the first new shard on, a random moment later.
        while process.poll() is None and _lines(journal) <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "killed" / whole.name).exists():
            break
        progress.append(_lines(journal))
    assert progress == sorted(progress)
    assert progress[-1] > progress[1] > 0
    assert start("killed").wait() == 0
    killed = tmp_path / "killed" / whole.name
    assert contents(killed) == contents(whole)
    assert len(open_documents(killed)) == len(rows)


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
