"""Building a token cache: one writer, shard by shard, resumable at every shard.

    <cache_dir>/<key>.lock        held by the process that builds
    <cache_dir>/<key>.building/  arrays that only grow, and journal.jsonl, one line a finished shard

A journal line is written after the shard's bytes, and holds how long every file is then and the
checksum of what was added. A build that finds a journal keeps the shards whose bytes are all there
and right, cuts the files after the last of them, and goes on with the next chunk. The folder gets
its final name, by one rename, when everything in it is complete and on disk.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.row_tokenizer import Shard
from data.token_cache import CACHE_FORMAT, MANIFEST, Documents

BAD_ROWS = "bad_rows.jsonl"
_FILES = ("input_ids.bin", "loss_mask.bin", "lengths.bin", "provenance.bin", BAD_ROWS)
_JOURNAL = "journal.jsonl"
_COPY_BYTES = 1 << 22
_BAD_ROWS_IN_REPORT = 20
# Counts that are maxima; all others are sums.
_MAXIMA = ("max token id",)


class ShardSink(Protocol):
    """Where finished shards go."""

    def add(self, shard: Shard) -> None:
        """Take the next shard."""


def add_counts(total: Counter[str], more: dict[str, int]) -> None:
    """Add the counts of a shard."""
    for name, value in more.items():
        total[name] = max(total[name], value) if name in _MAXIMA else total[name] + value


def report_of(counts: Counter[str], bad_rows: list[list[str]]) -> dict[str, Any]:
    """The report of a build, from its counts.

    Returns:
        ``read``, ``kept``, ``trimmed``, ``dropped`` (rows by reason), ``turns``,
        ``stopped_turns``, ``tokens``, ``trained_tokens``, ``boundary_tokens``, ``max_token_id``
        and the first ``bad_rows`` as [place, reason, detail].
    """
    dropped = {
        name.removeprefix("dropped: "): value
        for name, value in sorted(counts.items())
        if name.startswith("dropped: ")
    }
    names = ("read", "kept", "trimmed", "turns", "stopped turns", "tokens", "trained tokens")
    report: dict[str, Any] = {name.replace(" ", "_"): counts[name] for name in names}
    report["boundary_tokens"] = counts["boundary tokens"]
    report["max_token_id"] = counts.get("max token id", -1)
    report["dropped"] = dropped
    report["bad_rows"] = bad_rows[:_BAD_ROWS_IN_REPORT]
    return report


class MemorySink:
    """Keeps shards in memory."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.counts: Counter[str] = Counter()
        self.bad_rows: list[list[str]] = []

    def add(self, shard: Shard) -> None:
        """Take the next shard."""
        self.shards.append(shard)
        add_counts(self.counts, shard.counts)
        room = _BAD_ROWS_IN_REPORT - len(self.bad_rows)
        self.bad_rows += [list(row) for row in shard.bad_rows[: max(0, room)]]

    def documents(self, fingerprint: str) -> Documents:
        """All documents so far."""
        shards = self.shards
        lengths = np.concatenate([shard.lengths for shard in shards])
        return Documents(
            input_ids=np.concatenate([shard.input_ids for shard in shards]),
            loss_mask=np.concatenate([shard.loss_mask for shard in shards]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            provenance=np.concatenate([shard.provenance for shard in shards]),
            fingerprint=fingerprint,
            report=report_of(self.counts, self.bad_rows),
        )


class FolderSink:
    """Appends shards to the files of a folder, with a journal.

    Args:
        folder: The ``.building`` folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self.bad_rows: list[list[str]] = []
        self.done = 0  # finished shards
        self._sizes = dict.fromkeys(_FILES, 0)
        self._recover()
        self._open = ExitStack()
        self._files = {
            name: self._open.enter_context((folder / name).open("ab")) for name in _FILES
        }
        self._journal = self._open.enter_context((folder / _JOURNAL).open("ab"))

    def add(self, shard: Shard) -> None:
        """Append the next shard, then enter it in the journal."""
        lines = "".join(json.dumps(row) + "\n" for row in shard.bad_rows)
        parts = {
            "input_ids.bin": shard.input_ids.tobytes(),
            "loss_mask.bin": shard.loss_mask.tobytes(),
            "lengths.bin": shard.lengths.tobytes(),
            "provenance.bin": shard.provenance.tobytes(),
            BAD_ROWS: lines.encode(),
        }
        checksum = 0
        for name, data in parts.items():
            self._files[name].write(data)
            self._files[name].flush()
            self._sizes[name] += len(data)
            checksum = zlib.crc32(data, checksum)
        entry = {"sizes": self._sizes, "crc32": checksum, "counts": shard.counts}
        self._journal.write((json.dumps(entry) + "\n").encode())
        self._journal.flush()
        self._count(shard.counts, [list(row) for row in shard.bad_rows])

    def publish(self, target: Path, fingerprint: str, extra: dict[str, Any]) -> None:
        """Complete the folder and give it its final name."""
        self.close()
        documents = self._sizes["lengths.bin"] // 8
        with (self.folder / "lengths.bin").open("rb") as lengths:
            with (self.folder / "offsets.bin").open("wb") as offsets:
                total = 0
                offsets.write(np.int64(0).tobytes())
                while block := lengths.read(_COPY_BYTES):
                    ends = np.cumsum(np.frombuffer(block, np.int64)) + total
                    total = int(ends[-1])
                    offsets.write(ends.astype(np.int64).tobytes())
        manifest = {
            "format": CACHE_FORMAT,
            "fingerprint": fingerprint,
            "documents": documents,
            "tokens": total,
            "report": report_of(self.counts, self.bad_rows) | extra,
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*_FILES, "offsets.bin", MANIFEST):
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        for name in ("lengths.bin", _JOURNAL):
            (self.folder / name).unlink()
        os.rename(self.folder, target)

    def close(self) -> None:
        """Close the files; what is finished stays for another build to go on from."""
        self._open.close()

    def _count(self, counts: dict[str, int], bad_rows: list[list[str]]) -> None:
        self.done += 1
        add_counts(self.counts, counts)
        room = _BAD_ROWS_IN_REPORT - len(self.bad_rows)
        self.bad_rows += bad_rows[: max(0, room)]

    def _recover(self) -> None:
        """Read the journal, check each shard, and cut off whatever is not in it."""
        journal = self.folder / _JOURNAL
        good = 0  # bytes of the journal
        with ExitStack() as stack:
            files = {}
            for name in _FILES:
                (self.folder / name).touch()
                files[name] = stack.enter_context((self.folder / name).open("rb"))
            for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
                entry = _journal_entry(line)
                if entry is None or not self._shard_is_whole(entry, files):
                    break
                good += len(line)
        journal.touch()
        os.truncate(journal, good)
        for name in _FILES:
            os.truncate(self.folder / name, self._sizes[name])

    def _shard_is_whole(self, entry: dict[str, Any], files: dict[str, Any]) -> bool:
        checksum, bad_rows = 0, []
        for name in _FILES:
            size = entry["sizes"][name] - self._sizes[name]
            files[name].seek(self._sizes[name])
            data = files[name].read(size)
            if len(data) != size:
                return False
            checksum = zlib.crc32(data, checksum)
            if name == BAD_ROWS:
                bad_rows = [json.loads(row) for row in data.splitlines()]
        if checksum != entry["crc32"]:
            return False
        self._sizes = dict(entry["sizes"])
        self._count(entry["counts"], bad_rows)
        return True


def feed(sink: ShardSink, shards: Iterator[Shard]) -> None:
    """Hand shards to a sink.

    Raises:
        DataError: a row stops the run, or the disk is full.
    """
    for shard in shards:
        if shard.error is not None:
            raise DataError(shard.error)
        try:
            sink.add(shard)
        except OSError as error:
            raise DataError(
                f"--data-cache-dir: cannot write the token cache ({error}). Free some space or "
                "give another folder; run again to continue from here."
            ) from error


def _journal_entry(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry
