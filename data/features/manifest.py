"""What a folder of features holds: the fields, the documents and the files, in a manifest.

    <features>/<split>/documents/                             a token cache: ids, answer mask, offsets
    <features>/<split>/features-00000-of-00007.safetensors    whole documents: [tokens or trained, width]
    <features>/<split>/manifest.json                          written last: who sees it may read

A field has a row for each token of a document, or for each position that predicts a trained token: where
the mask of the next token of the document is 1.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.documents.documents import Documents
from data.documents.mixture import DocumentSet
from data.errors import DataError
from data.features.files import FileSum
from data.packs.filling import IntArray

FEATURES_FORMAT = 1
MANIFEST = "manifest.json"
WRITING = "writing.json"
# Of `made_by`, what features that were written before do not have.
ADDED = ("architecture", "computed_in")
DOCUMENTS = "documents"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int32": torch.int32,
}

Per = Literal["token", "trained"]


@dataclass(frozen=True)
class Field:
    """One kind of feature.

    Attributes:
        name: Its key in files and packs.
        width: Numbers in a row.
        dtype: A key of ``DTYPES``.
        per: A row for each token, or for each position that predicts a trained token.
    """

    name: str
    width: int
    dtype: str
    per: Per = "token"

    def __post_init__(self) -> None:
        if self.width < 1 or self.dtype not in DTYPES or self.per not in ("token", "trained"):
            raise DataError(
                f"field {self.name}: width {self.width}, dtype {self.dtype}, per {self.per}; a width is 1 "
                f"or more, a dtype one of {', '.join(DTYPES)}, and rows are per token or trained."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.width} x {self.dtype} per {self.per}"


def hidden_fields(hidden_size: int, dtype: str, aux_layers: int = 3) -> list[Field]:
    """Hidden states after the final norm and, one behind the other, those of ``aux_layers`` layers."""
    fields = [Field("hidden_states", hidden_size, dtype)]
    if aux_layers:
        fields.append(Field("aux_hidden_states", aux_layers * hidden_size, dtype))
    return fields


def top_k_fields(k: int, dtype: str) -> list[Field]:
    """The teacher's k likeliest next tokens, their log-probabilities, and that of all others together.

    The mass of the others is kept because it does not follow from rounded log-probabilities: what
    bf16 does to a sum near 1 is more than what is left of it.
    """
    return [
        Field("topk_ids", k, "int32", "trained"),
        Field("topk_logprobs", k, dtype, "trained"),
        Field("rest_logprobs", 1, dtype, "trained"),
    ]


def rows_per_document(documents: Documents | DocumentSet) -> dict[Per, IntArray]:
    """Rows of each document, int64 ``[num_documents]``: its tokens, and those that predict a trained one.

    The first token of a document has none before it that could predict it.
    """
    if isinstance(documents, DocumentSet):
        parts = [_trained_rows(part) for part in documents.parts]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        trained = np.concatenate(parts)[starts[documents.part_of] + documents.index_of]
    else:
        trained = _trained_rows(documents)
    return {"token": documents.lengths, "trained": trained}


def _trained_rows(documents: Documents) -> IntArray:
    if not len(documents):
        return np.empty(0, np.int64)
    begins = documents.offsets[:-1]
    all_trained: IntArray = np.add.reduceat(documents.loss_mask, begins, dtype=np.int64)
    return all_trained - documents.loss_mask[begins]


def estimate_bytes(documents: Documents | DocumentSet, fields: Sequence[Field]) -> int:
    """Bytes of a folder of features, without the headers of its files: less than 2 KiB each."""
    rows = rows_per_document(documents)
    tokens, count = int(rows["token"].sum()), len(documents)
    own = tokens * (4 + 1) + count * (8 + 16 + 8) + 8  # ids, mask; offsets, provenance, hashes
    return own + sum(int(rows[field.per].sum()) * field.row_bytes for field in fields)


@dataclass(frozen=True)
class ShardFile(FileSum):
    """A file of features, with the documents that it holds."""

    first_document: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        split: ``train``, ``valid`` or ``test``, as it was written.
        documents: How many there are.
        tokens: Of all of them.
        trained_tokens: Those of them that another token of their document predicts.
        contents: Hash of the documents, as ``Documents.contents``.
        fields: What is kept of each document.
        made_by: What the features depend on beside the documents: hashes of the base, the tokenizer and
            the template, the architecture, the precision and the auxiliary layers, by name.
        shards: The files of features.
        document_files: Those of the documents.
    """

    split: str
    documents: int
    tokens: int
    trained_tokens: int
    contents: str
    fields: tuple[Field, ...]
    made_by: dict[str, Any]
    shards: tuple[ShardFile, ...]
    document_files: tuple[FileSum, ...]

    def text(self) -> str:
        """As it is written, with a check sum of all else."""
        found = {"format": FEATURES_FORMAT, **asdict(self)}
        return json.dumps({**found, "crc32": _sum(found)}, indent=1)


def _sum(found: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """What a complete folder of features says of itself.

    Raises:
        DataError: there is no such folder, it is empty or still being written, or its manifest is of
            another format or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(_why_no_manifest(folder))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (version := found.pop("format")) != FEATURES_FORMAT:
            raise DataError(
                f"{path}: features of format {version}; this version reads {FEATURES_FORMAT}. Extract "
                "them again into another folder."
            )
        written = found.pop("crc32", None)  # None: by a version before
        if written not in (None, _sum({"format": version, **found})):
            raise ValueError("changed or damaged, by its own check sum")
        found["fields"] = tuple(Field(**field) for field in found["fields"])
        found["shards"] = tuple(ShardFile(**shard) for shard in found["shards"])
        found["document_files"] = tuple(FileSum(**each) for each in found["document_files"])
        manifest = Manifest(**found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not the manifest of a folder of features ({type(error).__name__}: {error}). Extract "
            "the features again into another folder."
        ) from error
    return manifest


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{folder}: no such folder of features; {folder.parent} has "
            f"{', '.join(_splits_in(folder.parent)) or 'none'}. Extract that split too."
        )
    if (folder / WRITING).exists():
        shards = len(list(folder.glob("features-*.json")))
        return (
            f"{folder}: still being written, {shards} files of features are complete. Wait for the "
            "extraction to end, or start it again as before: it goes on where it stopped."
        )
    if within := _splits_in(folder):
        return f"{folder}: holds the splits {', '.join(within)}; give the folder of one."
    return f"{folder}: holds no features, neither {MANIFEST} nor .pt files. Extract them into it first."


def _splits_in(folder: Path) -> list[str]:
    return [split for split in ("train", "valid", "test") if (folder / split).is_dir()]


def identity(contents: str, fields: Sequence[Field], made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the bytes of features, by name."""
    return {
        "documents": contents,
        **{f"field {field.name}": str(field) for field in fields},
        **made_by,
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The names whose values are not the same, with both; empty when all are.

    Of values that have names themselves those are compared that both have: a version may know more.
    """
    texts = []
    for name in {**found, **wanted}:
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            both = there.keys() & here.keys()
            texts.append(differences(*({k: v[k] for k in v if k in both} for v in (there, here))))
        elif there != here:
            texts.append(f"{name} is {there!r} there and {here!r} here")
    return "; ".join(filter(None, texts))


def known_before(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What is wanted, without what features of a version before do not say of themselves."""
    return {n: value for n, value in wanted.items() if n in found or n not in ADDED}
