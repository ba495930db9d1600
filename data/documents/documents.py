"""Tokenised documents as memory-mapped arrays, in a folder named by everything that they depend on.

    <cache_dir>/<key>/manifest.json    format, counts, report, hash of the contents; written last
    <cache_dir>/<key>/input_ids.bin    int32  [total_tokens]
    <cache_dir>/<key>/loss_mask.bin    uint8  [total_tokens]
    <cache_dir>/<key>/offsets.bin      int64  [num_documents + 1]
    <cache_dir>/<key>/provenance.bin   int64  [num_documents, 2]   (source, row in that source)
    <cache_dir>/<key>/hashes.bin       uint64 [num_documents]
    <cache_dir>/<key>/pictures.bin, picture_sizes.bin      a PictureTable; empty for a model of text

A folder appears under its final name by one atomic rename, after its files are complete: whoever
sees it can use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.documents.check_sum import check_sum
from data.errors import DataError
from data.images.pictures import Picture, PictureTable

CACHE_FORMAT = 2
MANIFEST = "manifest.json"
PICTURES = ("pictures.bin", "picture_sizes.bin")


@dataclass(frozen=True)
class Documents:
    """Tokenised documents: one conversation is one document.

    Attributes:
        input_ids: int32 ``[total_tokens]``.
        loss_mask: uint8 ``[total_tokens]``; 1 means that this token itself is trained (labels are
            not shifted here).
        offsets: int64 ``[num_documents + 1]``; document i is ``input_ids[offsets[i] : offsets[i +
            1]]``.
        provenance: int64 ``[num_documents, 2]``: number of the source, row number in it (both from
            0).
        hashes: uint64 ``[num_documents]``: hash of each document's tokens.
        fingerprint: Name of the cache: a hash of what it was made from, and by which code.
        report: Counts: rows read, rows kept, rows dropped by reason, tokens, trained tokens, and
            what was detected.
        contents: Hash of ids, masks and their order, whatever they were made from: equal documents have
            equal ones (``contents_of``). Computed where it is not given.
        pictures: Where the pictures of each lie; None where no document has any.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    provenance: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    fingerprint: str
    report: dict[str, Any] = field(default_factory=dict)
    contents: str = ""
    pictures: PictureTable | None = None

    def __post_init__(self) -> None:
        if not self.contents:
            contents = contents_of(self.lengths, self.hashes, [self.loss_mask])
            object.__setattr__(self, "contents", contents)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Document ``index``: ids int32 ``[tokens]`` and mask uint8 ``[tokens]``; views."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.input_ids[start:end], self.loss_mask[start:end]

    def pictures_of(self, index: int) -> list[Picture]:
        """The pictures of document ``index``."""
        return [] if self.pictures is None else self.pictures.of(index)

    @property
    def has_pictures(self) -> bool:
        """Whether any document has pictures."""
        return self.pictures is not None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each document, int64 ``[num_documents]``."""
        return np.diff(self.offsets)

    @property
    def max_token_id(self) -> int:
        """The largest token id that occurs, for a check against the vocabulary; -1 when empty."""
        return int(self.report.get("max_token_id", -1))


# Without these nothing can be mapped.
_NEEDED: dict[str, type] = {"tokens": int, "documents": int, "fingerprint": str, "report": dict}


def open_documents(folder: Path) -> Documents:
    """Memory-map a published cache folder.

    Raises:
        DataError: the folder is not a complete cache of this format, or a file has changed since.
    """
    manifest = cache_manifest(folder)
    documents = map_documents(folder, manifest)
    sums = manifest.get("crc32")  # older versions wrote none
    for name, written in sums.items() if isinstance(sums, dict) else ():
        if check_sum(folder / name) != written:
            raise DataError(
                f"{folder / name}: changed or damaged since the token cache was written. Remove the folder "
                f"{folder} and run again."
            )
    return documents


def cache_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a published cache folder says.

    Raises:
        DataError: the folder is not a complete cache of this format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder}: not a complete token cache ({error}). Remove the folder and run again."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != CACHE_FORMAT or not _is_whole(manifest):
        raise DataError(
            f"{folder}: token cache of format {found}, or a part of one; "
            f"this version reads {CACHE_FORMAT}. "
            "Remove the folder and run again."
        )
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    kinds = _NEEDED | {"contents": str} if "contents" in manifest else _NEEDED
    typed = all(type(manifest.get(name)) is kind for name, kind in kinds.items())
    return typed and min(manifest["tokens"], manifest["documents"]) >= 0


def map_documents(folder: Path, manifest: dict[str, Any]) -> Documents:
    """Memory-map the arrays of a folder.

    Args:
        folder: With all the files of a cache.
        manifest: What its manifest says, or will say.

    Raises:
        DataError: a file has not the size that the manifest says.
    """
    tokens, documents = int(manifest["tokens"]), int(manifest["documents"])
    return Documents(
        input_ids=_map(folder / "input_ids.bin", np.int32, (tokens,)),
        loss_mask=_map(folder / "loss_mask.bin", np.uint8, (tokens,)),
        offsets=_map(folder / "offsets.bin", np.int64, (documents + 1,)),
        provenance=_map(folder / "provenance.bin", np.int64, (documents, 2)),
        hashes=_map(folder / "hashes.bin", np.uint64, (documents,)),
        fingerprint=manifest["fingerprint"],
        report=manifest["report"],
        contents=manifest.get("contents", ""),
        pictures=_map_pictures(folder, documents),
    )


def _map_pictures(folder: Path, documents: int) -> PictureTable | None:
    lines, sizes = (folder / name for name in PICTURES)
    if not lines.is_file() or not lines.stat().st_size:  # older versions wrote none
        return None
    table = _map(sizes, np.int32, (documents,))
    return PictureTable(_map(lines, np.uint8, (int(table.sum(dtype=np.int64)),)), table)


def contents_of(
    lengths: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    masks: Iterable[npt.NDArray[np.uint8]],
) -> str:
    """Hash of documents in their order: the same for a file and for all that a mixture takes of it.

    Args:
        lengths: Tokens in each document, int64 ``[num_documents]``.
        hashes: Hash of each document's tokens, uint64 ``[num_documents]``.
        masks: Their masks one behind the other, in pieces of any size; a mapped file is read as the hash
            goes over it.
    """
    digest = hashlib.sha256(np.ascontiguousarray(lengths).data)
    digest.update(np.ascontiguousarray(hashes).data)
    for mask in masks:
        digest.update(mask.data)
    return digest.hexdigest()[:32]


def _map(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else -1
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes where the manifest promises {expected}. "
            "The token cache is damaged; "
            f"remove {path.parent} and run again."
        )
    if expected == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
