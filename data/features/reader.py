"""Reads the features of single documents from memory-mapped files.

A folder is checked when it is opened: the sizes of all files and the check sums of those of the documents;
of those of features too where they are not more than ``CHECKED_WHEN_OPENED`` together. Else each is checked
when its first document is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data.documents.documents import Documents, open_documents
from data.documents.mixture import DocumentSet
from data.errors import DataError
from data.features.manifest import (
    DOCUMENTS,
    Field,
    Per,
    differences,
    known_before,
    read_manifest,
    rows_per_document,
)
from data.packs.filling import IntArray

# Bytes of features: about a second.
CHECKED_WHEN_OPENED = 1 << 30


class Features(Protocol):
    """Documents and what is kept of each."""

    folder: Path
    fields: dict[str, Field]
    made_by: dict[str, Any] | None
    """None where the folder does not say."""

    @property
    def documents(self) -> Documents | DocumentSet:
        """The documents."""

    def read(self, document: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The fields of a document, all or those of ``names``, each ``[rows, width]`` on the host."""


class FeatureReader:
    """Reads a folder that ``FeatureWriter`` has finished. Threads may share it.

    Files are mapped when they are first needed and stay so; none is kept open.

    Args:
        folder: ``<features>/<split>``.

    Raises:
        DataError: no features, not all of them, or not as they were written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = read_manifest(self.folder)
        self.fields = {field.name: field for field in manifest.fields}
        self.made_by: dict[str, Any] | None = manifest.made_by
        self._checked = sum(shard.bytes for shard in manifest.shards) <= CHECKED_WHEN_OPENED
        for part in manifest.document_files:
            part.require(self.folder, contents=True)
        for part in manifest.shards:
            part.require(self.folder, contents=self._checked)
        self.documents = open_documents(self.folder / DOCUMENTS)
        if self.documents.contents != manifest.contents:
            raise DataError(
                f"{self.folder}: the documents are others than the features were made of. Copy the whole "
                "folder again, or extract its features again."
            )
        self._first = np.array([shard.first_document for shard in manifest.shards])
        self._files: dict[int, safe_open] = {}
        self._lock = threading.Lock()

    def read(self, document: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The fields of a document, all or those of ``names``, each ``[rows, width]``: views of the files.

        Raises:
            DataError: the file is damaged.
        """
        if not 0 <= document < len(self.documents):
            raise IndexError(document)
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        file = self._files.get(shard) or self._open(shard)
        first = int(self._first[shard])
        result = {}
        for name in self.fields if names is None else names:
            starts = self._starts[self.fields[name].per]
            begin, end = (int(starts[at] - starts[first]) for at in (document, document + 1))
            result[name] = file.get_slice(name)[begin:end]
        return result

    @cached_property
    def _starts(self) -> dict[Per, IntArray]:
        """Rows before each document, int64 ``[num_documents + 1]``."""
        rows = rows_per_document(self.documents)
        return {per: np.concatenate([[0], np.cumsum(counts)]) for per, counts in rows.items()}

    def _open(self, shard: int) -> safe_open:
        with self._lock:
            if shard in self._files:
                return self._files[shard]
            part = self.manifest.shards[shard]
            if not self._checked:
                part.require(self.folder, contents=True)
            path = self.folder / part.file
            last = part.first_document + part.documents
            wanted = {
                name: [
                    int(np.subtract(*self._starts[field.per][[last, part.first_document]])),
                    field.width,
                ]
                for name, field in self.fields.items()
            }
            try:
                file = safe_open(path, "pt")
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path}: cannot be read ({error}).") from error
            if found != wanted:
                raise DataError(f"{path}: holds {found}; by the manifest it is {wanted}.")
            self._files[shard] = file
            return file


def require_made_by(features: Features, wanted: Mapping[str, Any]) -> None:
    """Refuse features of another base, tokenizer, template, size or layers.

    Args:
        features: What was opened.
        wanted: What they have to be made by: values of ``made_by``, and ``hidden_size`` and
            ``aux_hidden_size``, the widths of the hidden states. Of a folder that does not say what made
            it only the widths are compared.

    Raises:
        DataError: one is another; the message has both.
    """
    widths = {
        size: features.fields[name].width
        for size, name in (
            ("hidden_size", "hidden_states"),
            ("aux_hidden_size", "aux_hidden_states"),
        )
        if name in features.fields
    }
    found = {**(features.made_by or {}), **widths}
    if features.made_by is None:
        wanted = {name: value for name, value in wanted.items() if name in widths}
    wanted = known_before(found, wanted)
    if other := differences({name: found.get(name) for name in wanted}, wanted):
        raise DataError(
            f"{features.folder}: these features were made otherwise: {other}. Extract them again with "
            "this run's base, tokenizer, chat template and layers into another folder, or train with "
            "theirs."
        )
