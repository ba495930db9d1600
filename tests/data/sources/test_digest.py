import hashlib
import json
import os

import pytest

from data.errors import DataError
from data.sources.digest import digest_files


def old(path, text, age=100):
    path.write_text(text)
    past = path.stat().st_mtime - age
    os.utime(path, (past, past))
    return path


def test_digest_follows_contents_and_order(tmp_path):
    a, b = old(tmp_path / "a", "one"), old(tmp_path / "b", "two")
    assert digest_files([a, b], None) == digest_files([a, b], None) != digest_files([b, a], None)
    before = digest_files([a], None)
    old(a, "other")
    assert digest_files([a], None) != before


def test_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.digest._SETTLED_NS", -1)  # what was written just now counts
    a, memory = old(tmp_path / "a", "one"), tmp_path / "memory"
    first = digest_files([a], memory)
    monkeypatch.setattr("hashlib.file_digest", None)  # reading the file again would fail
    assert digest_files([a], memory) == first
    monkeypatch.undo()
    old(a, "two", age=50)
    second = digest_files([a], memory)
    assert second != first


def test_time_that_was_set_back_hides_no_change(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.digest._SETTLED_NS", -1)
    a, memory = old(tmp_path / "a", "one"), tmp_path / "memory"
    first, before = digest_files([a], memory), a.stat()
    while a.stat().st_ctime_ns == before.st_ctime_ns:  # of one size, in one inode
        a.write_text("two")
    os.utime(a, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert a.stat().st_mtime_ns == before.st_mtime_ns
    assert digest_files([a], memory) != first


def test_file_written_a_moment_ago_is_not_remembered(tmp_path):
    a, memory = tmp_path / "a", tmp_path / "memory"
    old(a, "one", age=-60)  # of a clock that is ahead, so that it is a moment ago for long
    digest_files([a], memory)
    assert not (memory / "digests.json").exists()


def test_damaged_memory_is_no_trouble(tmp_path):
    a = old(tmp_path / "a", "one")
    path = json.dumps(str(a.resolve()))
    entries = (f"{{{path}: {entry}}}" for entry in ("7", '"x"', "{}", "[1, 2, 3]", "null"))
    for text in ("{broken", "[]", "7", "[" * 100_000, *entries):
        (tmp_path / "digests.json").write_text(text)
        assert digest_files([a], tmp_path) == digest_files([a], None)


def test_versions_that_share_a_memory_read_it(tmp_path, monkeypatch):
    """One that knew no ctime reads `[size, mtime, inode, digest]`, and writes that."""
    monkeypatch.setattr("data.sources.digest._SETTLED_NS", -1)
    a, file = old(tmp_path / "a", "one"), tmp_path / "digests.json"
    digest_files([a], tmp_path)
    ((path, entry),) = json.loads(file.read_text()).items()
    stat = a.stat()
    assert entry[:3] == [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    assert entry[3] == hashlib.sha256(b"one").hexdigest()
    file.write_text(json.dumps({path: [*entry[:3], "of some other time"]}))
    assert digest_files([a], tmp_path) == digest_files([a], None)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="gone"):
        digest_files([tmp_path / "gone"], None)
