"""Writes a folder of features: shard by shard, from any number of processes, resumable at every shard.

Which documents a shard holds follows from the documents and the fields alone, so its bytes are the same
whoever writes it, and whenever. On the way the folder holds

    writing.json                             what is being written: nobody goes on with something else
    features-00003-of-00007.json             the bytes and check sum of a shard that is complete
    features-00003-of-00007....tmp           a shard that is being written, or whose writer was killed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.documents.cache_build import ALL_FILES, JOURNAL, FolderSink
from data.documents.cache_folder import build_once, machine
from data.documents.documents import MANIFEST as DOCUMENTS_MANIFEST
from data.documents.documents import Documents
from data.documents.mixture import DocumentSet
from data.documents.shard import Shard
from data.errors import DataError
from data.features.files import (
    FileSum,
    sync,
    write_safetensors,
    write_whole,
)
from data.features.manifest import (
    DOCUMENTS,
    DTYPES,
    FEATURES_FORMAT,
    MANIFEST,
    WRITING,
    Field,
    Manifest,
    ShardFile,
    differences,
    estimate_bytes,
    identity,
    known_before,
    read_manifest,
    rows_per_document,
)
from data.features.reader import FeatureReader
from data.packs.filling import next_fit

# Documents that go to the folder at a time.
_CHUNK = 4096
_OURS = ("features-", "documents", WRITING, MANIFEST)


class FeatureWriter:
    """Writes the features of one split.

    Every process that writes makes one with the same arguments; each shard is written by one process at
    a time. When none is pending any more, one process calls ``finish``.

    Args:
        folder: ``<features>/<split>``; made if it is not there.
        documents: What the features are of, in the order in which they are kept.
        fields: What is kept of each document.
        made_by: What else decides about the features, as plain JSON values by name: hashes of base,
            tokenizer and template, auxiliary layers. A folder is gone on with, and later read, only where
            these are the same.
        shard_bytes: Of features in a file; a document is never cut.

    Raises:
        DataError: no fields, no documents or an empty one; no room on the disk; the folder
            holds something else, or features that were made otherwise.
    """

    def __init__(
        self,
        folder: str | Path,
        documents: Documents | DocumentSet,
        fields: Sequence[Field],
        made_by: Mapping[str, Any],
        shard_bytes: int = 512 << 20,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.documents = documents
        self.fields = {field.name: field for field in fields}
        self.made_by: dict[str, Any] = json.loads(json.dumps(dict(made_by)))
        if not fields or not len(documents) or documents.lengths.min() < 1:
            raise DataError(
                f"{self.folder}: nothing to write: {len(fields)} fields of {len(documents)} documents, the "
                f"shortest of {min(documents.lengths, default=0)} tokens."
            )
        self._rows = rows_per_document(documents)
        sizes = sum(self._rows[field.per] * field.row_bytes for field in fields)
        shard_of, count = next_fit(np.minimum(sizes, shard_bytes), shard_bytes)
        self._bounds = np.searchsorted(shard_of, np.arange(count + 1))
        self._complete: set[int] = set()
        self._identity = identity(documents.contents, fields, self.made_by)
        self._claim = {"shard_bytes": shard_bytes, **self._identity}
        self.finished = (self.folder / MANIFEST).exists()
        try:
            self._begin()
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def __len__(self) -> int:
        """Shards, complete or not."""
        return len(self._bounds) - 1

    def documents_of(self, shard: int) -> range:
        """The documents of a shard."""
        return range(int(self._bounds[shard]), int(self._bounds[shard + 1]))

    def rows_of(self, shard: int, name: str) -> int:
        """Rows of a field in a shard."""
        documents = self.documents_of(shard)
        return int(self._rows[self.fields[name].per][documents.start : documents.stop].sum())

    def pending(self, of: Iterable[int] | None = None) -> list[int]:
        """The shards that are not complete; those that are found are read once for their check sums.

        Args:
            of: Only these, such as a process' share; all when not given.
        """
        shards = range(len(self)) if of is None else of
        return [] if self.finished else [shard for shard in shards if not self._is_complete(shard)]

    def write(self, shard: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a shard: it is there as a whole, on disk, or not at all.

        Args:
            shard: Its number.
            tensors: Each field, ``[rows_of(shard, field), width]`` in the field's dtype, on the host: the
                rows of the documents of the shard one behind the other.

        Raises:
            DataError: a number that is not finite (a log-probability may be -inf), or no room.
            ValueError: other fields, shapes or dtypes.
        """
        self._check(shard, tensors)
        name = self._name(shard)
        path = self.folder / f"{name}.safetensors"
        temporary = self.folder / f"{name}.{machine()}-{os.getpid()}.tmp"
        try:
            for killed in self.folder.glob(f"{name}.*.tmp"):
                killed.unlink()
            crc32 = write_safetensors(temporary, tensors)
            entry = FileSum(path.name, temporary.stat().st_size, crc32)
            os.replace(temporary, path)
            sync(self.folder)
            write_whole(self.folder / f"{name}.json", json.dumps(asdict(entry)))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _cannot_write(path, error) from error
        self._complete.add(shard)

    def finish(self) -> Manifest:
        """Write the manifest, and take away what was needed on the way; again, it changes nothing.

        Raises:
            DataError: a shard is not complete.
        """
        try:
            if not self.finished:
                self._require_claim()
                write_whole(self.folder / MANIFEST, self._manifest().text())
                self.finished = True
            self._tidy()
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        return read_manifest(self.folder)

    def _begin(self) -> None:
        if self.finished:
            manifest = read_manifest(self.folder)
            found = identity(manifest.contents, manifest.fields, manifest.made_by)
            if other := differences(found, known_before(found, self._identity)):
                raise DataError(
                    f"{self.folder}: holds features that were made otherwise: {other}. {_ELSE}"
                )
            FeatureReader(self.folder)  # all that is written is there, and as it was written
            return
        require_room(self.folder, room_for(self.folder, self.documents, list(self.fields.values())))
        self.folder.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in self.folder.iterdir() if not p.name.startswith(_OURS)]
        if foreign:
            raise DataError(f"{self.folder}: holds something else ({min(foreign)}). {_ELSE}")
        if not (self.folder / WRITING).exists():
            text = {"format": FEATURES_FORMAT, **self._claim}
            write_whole(self.folder / WRITING, json.dumps(text, indent=1))
        self._require_claim()
        build_once(self.folder, DOCUMENTS, self._write_documents)

    def _require_claim(self) -> None:
        """Refuse a folder in which something else is being written."""
        found = json.loads((self.folder / WRITING).read_text(encoding="utf-8"))
        if other := differences(found, {"format": FEATURES_FORMAT, **self._claim}):
            raise DataError(
                f"{self.folder}: holds a part of features that were made otherwise: {other}. {_ELSE}"
            )

    def _write_documents(self, folder: Path, target: Path) -> None:
        documents, (provenance, sources) = self.documents, _provenance(self.documents)
        hashes, lengths = documents.hashes, documents.lengths
        sink = FolderSink(folder)
        try:
            for begin in range(sink.finished.done * _CHUNK, len(documents), _CHUNK):
                part = slice(begin, min(begin + _CHUNK, len(documents)))
                ids, masks = zip(*(documents[i] for i in range(part.start, part.stop)), strict=True)
                sink.add(
                    Shard(
                        input_ids=np.concatenate(ids),
                        loss_mask=np.concatenate(masks),
                        lengths=lengths[part],
                        provenance=provenance[part],
                        hashes=hashes[part],
                        counts={},
                        bad_rows=[],
                    )
                )
            report = documents.report | {
                "sources": sources,
                "max_token_id": documents.max_token_id,
            }
            sink.publish(target, documents.contents, report)
        except OSError as error:
            raise _cannot_write(target, error) from error
        finally:
            sink.close()

    def _name(self, shard: int) -> str:
        return f"features-{shard:05}-of-{len(self):05}"

    def _entry(self, shard: int) -> FileSum | None:
        """What is noted of a shard that is complete."""
        note = self.folder / f"{self._name(shard)}.json"
        return FileSum(**json.loads(note.read_text(encoding="utf-8"))) if note.exists() else None

    def _is_complete(self, shard: int) -> bool:
        entry = None if shard in self._complete else self._entry(shard)
        if entry is not None:
            with suppress(DataError):  # what is not as it is noted is written anew
                entry.require(self.folder, contents=True)
                self._complete.add(shard)
        return shard in self._complete

    def _check(self, shard: int, tensors: Mapping[str, torch.Tensor]) -> None:
        wanted = {
            name: (DTYPES[field.dtype], (self.rows_of(shard, name), field.width))
            for name, field in self.fields.items()
        }
        given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if given != wanted:
            raise ValueError(f"shard {shard} is {wanted}, found {given}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            rows_per = self._rows[self.fields[name].per]
            wrong = tensor.isnan() if name.endswith("logprobs") else ~tensor.isfinite()
            if wrong.any():
                row = int(wrong.any(dim=1).nonzero()[0])
                documents = self.documents_of(shard)
                ends = np.cumsum(rows_per[documents.start : documents.stop])
                at = documents.start + int(np.searchsorted(ends, row, side="right"))
                raise DataError(
                    f"{name} of document {at} has numbers that are not finite. fp16 ends at 65504: write "
                    "bf16 or fp32; else the base computes them."
                )

    def _manifest(self) -> Manifest:
        shards = []
        for shard in range(len(self)):
            entry, documents = self._entry(shard), self.documents_of(shard)
            if entry is None:
                raise DataError(
                    f"{self.folder}: shard {shard} of {len(self)} is not written yet. Extract on."
                )
            entry.require(self.folder, contents=False)
            tokens = int(self._rows["token"][documents.start : documents.stop].sum())
            shards.append(
                ShardFile(
                    **asdict(entry),
                    first_document=documents.start,
                    documents=len(documents),
                    tokens=tokens,
                )
            )
        files = sorted({*ALL_FILES, "offsets.bin", DOCUMENTS_MANIFEST} - {"lengths.bin"})
        return Manifest(
            split=self.folder.name,
            documents=len(self.documents),
            tokens=int(self._rows["token"].sum()),
            trained_tokens=int(self._rows["trained"].sum()),
            contents=self.documents.contents,
            fields=tuple(self.fields.values()),
            made_by=self.made_by,
            shards=tuple(shards),
            document_files=tuple(FileSum.of(self.folder, f"{DOCUMENTS}/{name}") for name in files),
        )

    def _tidy(self) -> None:
        for building in self.folder.glob(f"{DOCUMENTS}.building-*"):
            shutil.rmtree(building)
        for pattern in ("*.tmp", "features-*.json", f"{DOCUMENTS}.lock", WRITING):
            for path in self.folder.glob(pattern):
                path.unlink()
        for name in ("lengths.bin", JOURNAL):  # left where a build was killed at its very end
            (self.folder / DOCUMENTS / name).unlink(missing_ok=True)


def room_for(folder: Path, documents: Documents | DocumentSet, fields: Sequence[Field]) -> int:
    """Bytes that a folder, of which a part may be written, still takes."""
    if (folder / MANIFEST).exists():
        return 0
    written = sum(path.stat().st_size for path in folder.glob("features-*.safetensors"))
    return max(0, estimate_bytes(documents, fields) - written)


def require_room(folder: Path, needed: int) -> None:
    """Refuse to write ``needed`` bytes of features where they do not fit.

    Raises:
        DataError: with both sizes.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{folder}: the features take {needed / 2**30:,.2f} GiB more, and {free / 2**30:,.2f} GiB are "
            "free. Make room, keep fewer documents or a smaller dtype."
        )


_ELSE = "Give another folder, or remove this one."


def _provenance(documents: Documents | DocumentSet) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Source and row of each document, and the names of the sources: of several parts, one list."""
    parts = documents.parts if isinstance(documents, DocumentSet) else [documents]
    names: list[list[str]] = [part.report.get("sources") or ["rows"] for part in parts]
    provenance = np.array(documents.provenance)
    if isinstance(documents, DocumentSet):
        provenance[:, 0] += np.cumsum([0, *map(len, names)])[documents.part_of]
    return provenance, [name for part in names for name in part]


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written ({error}). Make room, or give another folder; the same command again "
        "goes on where this one stopped."
    )
