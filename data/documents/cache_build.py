"""Building a token cache: one writer, shard by shard, resumable at every shard.

The folder holds arrays that only grow, and journal.jsonl, one line a finished shard.

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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from data.documents.check_sum import check_sum
from data.documents.documents import CACHE_FORMAT, MANIFEST, PICTURES, Documents, map_documents
from data.documents.shard import UNREAD, Shard
from data.errors import DataError
from data.images.pictures import PictureTable

BAD_ROWS = "bad_rows.jsonl"
ALL_FILES = (
    "input_ids.bin", "loss_mask.bin", "lengths.bin", "provenance.bin", "hashes.bin", BAD_ROWS, *PICTURES,
)  # fmt: skip
JOURNAL = "journal.jsonl"
_COPY_BYTES = 1 << 22
_BAD_ROWS_IN_REPORT = 20
# Counts that are maxima; all others are sums.
_MAXIMA = ("max token id",)


class ShardSink(Protocol):
    """Where finished shards go."""

    def add(self, shard: Shard) -> None:
        """Take the next shard."""


def report_of(counts: Counter[str], bad_rows: list[list[str]]) -> dict[str, Any]:
    """The report of a build, from its counts.

    Returns:
        ``read``, ``kept``, ``trimmed``, ``dropped`` (rows by reason), ``turns``,
        ``stopped_turns``, ``tokens``, ``trained_tokens``, ``boundary_tokens``,
        ``tools_not_shown`` (rows with tools that the template leaves out), ``unclosed_thoughts``
        (rows with an answer that ends inside its think block), ``empty_answers`` (rows with an answer
        that says nothing), ``unread`` (rows with something that nobody reads, by its name),
        ``max_token_id`` and the first ``bad_rows`` as [place, reason, detail].
    """

    def named(prefix: str) -> dict[str, int]:
        found = sorted(name for name in counts if name.startswith(prefix))
        return {name.removeprefix(prefix): counts[name] for name in found}

    names = ("read", "kept", "trimmed", "turns", "stopped turns", "tokens", "trained tokens")
    report: dict[str, Any] = {name.replace(" ", "_"): counts[name] for name in names}
    report["boundary_tokens"] = counts["boundary tokens"]
    report["tools_not_shown"] = counts["tools not shown"]
    report["unclosed_thoughts"] = counts["unclosed thoughts"]
    report["max_token_id"] = counts.get("max token id", -1)
    report["empty_answers"] = counts["empty answers"]
    report["unread"] = named(UNREAD)
    report["dropped"] = named("dropped: ")
    report["bad_rows"] = bad_rows
    return report


def is_report(report: dict[str, Any]) -> bool:
    """Whether a manifest's report has all that ``report_of`` writes and preparing adds."""
    known = report_of(Counter(), []) | {"warnings": []}
    return all(type(report.get(name)) is type(value) for name, value in known.items())


class MemorySink:
    """Keeps shards in memory."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.finished = Finished()

    def add(self, shard: Shard) -> None:
        """Take the next shard."""
        self.shards.append(shard)
        self.finished.add(shard.counts, [list(row) for row in shard.bad_rows])

    def documents(self, fingerprint: str) -> Documents:
        """All documents so far."""
        shards = self.shards
        lengths = np.concatenate([shard.lengths for shard in shards])
        sizes = np.concatenate([shard.picture_sizes for shard in shards])
        lines = np.frombuffer(b"".join(shard.pictures for shard in shards), np.uint8)
        return Documents(
            input_ids=np.concatenate([shard.input_ids for shard in shards]),
            loss_mask=np.concatenate([shard.loss_mask for shard in shards]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            provenance=np.concatenate([shard.provenance for shard in shards]),
            hashes=np.concatenate([shard.hashes for shard in shards]),
            fingerprint=fingerprint,
            report=self.finished.report(),
            pictures=PictureTable(lines, sizes) if len(lines) else None,
        )


class FolderSink:
    """Appends shards to the files of a folder, with a journal.

    Args:
        folder: The ``.building`` folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.finished = self._recovered()
        self._open = ExitStack()
        self._files = {
            name: self._open.enter_context((folder / name).open("ab")) for name in ALL_FILES
        }
        self._journal = self._open.enter_context((folder / JOURNAL).open("ab"))

    def add(self, shard: Shard) -> None:
        """Append the next shard, then enter it in the journal."""
        lines = "".join(json.dumps(row) + "\n" for row in shard.bad_rows)
        parts = {
            "input_ids.bin": shard.input_ids.tobytes(),
            "loss_mask.bin": shard.loss_mask.tobytes(),
            "lengths.bin": shard.lengths.tobytes(),
            "provenance.bin": shard.provenance.tobytes(),
            "hashes.bin": shard.hashes.tobytes(),
            BAD_ROWS: lines.encode(),
            PICTURES[0]: shard.pictures,
            PICTURES[1]: shard.picture_sizes.tobytes(),
        }
        checksum = 0
        for name, data in parts.items():
            self._files[name].write(data)
            self._files[name].flush()
            self.finished.sizes[name] += len(data)
            checksum = zlib.crc32(data, checksum)
        entry = {"sizes": self.finished.sizes, "crc32": checksum, "counts": shard.counts}
        self._journal.write((json.dumps(entry) + "\n").encode())
        self._journal.flush()
        self.finished.add(shard.counts, [list(row) for row in shard.bad_rows])

    def publish(self, target: Path, fingerprint: str, extra: dict[str, Any]) -> None:
        """Complete the folder and give it its final name.

        Raises:
            DataError: somebody else wrote into the folder.
            OSError: the disk is full, or another machine has published the cache.
        """
        self.close()
        self._require_own_bytes()
        documents = self.finished.sizes["lengths.bin"] // 8
        with (self.folder / "lengths.bin").open("rb") as lengths:
            with (self.folder / "offsets.bin").open("wb") as offsets:
                total = 0
                offsets.write(np.int64(0).tobytes())
                while block := lengths.read(_COPY_BYTES):
                    ends = np.cumsum(np.frombuffer(block, np.int64)) + total
                    total = int(ends[-1])
                    offsets.write(ends.astype(np.int64).tobytes())
        manifest: dict[str, Any] = {
            "format": CACHE_FORMAT,
            "fingerprint": fingerprint,
            "documents": documents,
            "tokens": total,
            "report": self.finished.report() | extra,
        }
        manifest["contents"] = map_documents(self.folder, manifest).contents
        manifest["crc32"] = {n: check_sum(self.folder / n) for n in (*ALL_FILES, "offsets.bin")}
        del manifest["crc32"]["lengths.bin"]
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*ALL_FILES, "offsets.bin", MANIFEST):
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        os.rename(self.folder, target)
        for name in ("lengths.bin", JOURNAL):  # of no use any more; until now they were
            (target / name).unlink()

    def close(self) -> None:
        """Close the files; what is finished stays for another build to go on from."""
        self._open.close()

    def _recovered(self) -> Finished:
        """What the journal has; whatever is not in it is cut off."""
        for name in (JOURNAL, *ALL_FILES):
            (self.folder / name).touch()
        found = read_journal(self.folder)
        for name, size in {**found.sizes, JOURNAL: found.journal_size}.items():
            os.truncate(self.folder / name, size)
        return found

    def _require_own_bytes(self) -> None:
        """Read everything once more: the folder must hold what was added, and nothing else."""
        found = read_journal(self.folder)
        on_disk = {name: (self.folder / name).stat().st_size for name in ALL_FILES}
        if found.done != self.finished.done or found.sizes != on_disk:
            raise DataError(
                f"--data-cache-dir: {self.folder} was written by two processes at once, so file "
                "locks do not work there. Give a folder on another file system, or remove this "
                "one and let one process build the cache first."
            )


@dataclass
class Finished:
    """The finished shards of a folder.

    Attributes:
        sizes: Bytes of each file.
        journal_size: Bytes of the journal.
        done: How many they are.
        counts: Their counts.
        bad_rows: The first of the rows that were left out.
    """

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ALL_FILES, 0))
    journal_size: int = 0
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    bad_rows: list[list[str]] = field(default_factory=list)

    def add(self, counts: dict[str, int], bad_rows: list[list[str]]) -> None:
        """Count one more."""
        self.done += 1
        for name, value in counts.items():
            before = self.counts[name]
            self.counts[name] = max(before, value) if name in _MAXIMA else before + value
        self.bad_rows = [*self.bad_rows, *bad_rows][:_BAD_ROWS_IN_REPORT]

    def report(self) -> dict[str, Any]:
        """As ``report_of``."""
        return report_of(self.counts, self.bad_rows)


def read_journal(folder: Path) -> Finished:
    """The shards of a folder whose bytes are all there and right, up to the first that is not."""
    finished = Finished()
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb")) for name in ALL_FILES}
        journal = stack.enter_context((folder / JOURNAL).open("rb"))
        for line in journal:
            entry = _journal_entry(line)
            if entry is None or not _is_whole(entry, files, finished):
                break
            finished.journal_size += len(line)
    return finished


def _is_whole(entry: dict[str, Any], files: Mapping[str, IO[bytes]], finished: Finished) -> bool:
    checksum, rows = 0, b""
    for name in ALL_FILES:
        size = entry["sizes"][name] - finished.sizes[name]
        if size < 0:  # two processes wrote here: the lock did not hold
            return False
        files[name].seek(finished.sizes[name])
        data = files[name].read(size)
        if len(data) != size:
            return False
        checksum = zlib.crc32(data, checksum)
        if name == BAD_ROWS:
            rows = data
    if checksum != entry["crc32"]:
        return False
    finished.sizes = dict(entry["sizes"])
    finished.add(entry["counts"], [json.loads(row) for row in rows.splitlines()])
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
        sizes, counts = entry["sizes"], entry["counts"]
        numbers = [*(sizes[name] for name in ALL_FILES), entry["crc32"], *counts.values()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # of something else
    return entry if all(type(number) is int for number in numbers) else None
