"""The data layer: rows -> conversations -> tokens and loss mask -> cache -> packs.

Needs neither Megatron nor CUDA nor a process group: everything here runs on plain Python, numpy
and a tokenizer. Names are imported when they are first used, so that worker processes which only
tokenise do not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.arguments import add_data_arguments
    from data.documents.documents import Documents
    from data.documents.mixture import DocumentSet
    from data.errors import DataError
    from data.features.dataset import OfflineDataset
    from data.packs.dataset import SFTDataset
    from data.prepare.prepare import prepare_documents
    from data.prepare.splits import prepare_documents_from_args

__all__ = [
    "DataError",
    "DocumentSet",
    "Documents",
    "OfflineDataset",
    "SFTDataset",
    "add_data_arguments",
    "prepare_documents",
    "prepare_documents_from_args",
]

_HOME = {
    "DataError": "data.errors",
    "DocumentSet": "data.documents.mixture",
    "Documents": "data.documents.documents",
    "OfflineDataset": "data.features.dataset",
    "SFTDataset": "data.packs.dataset",
    "add_data_arguments": "data.arguments",
    "prepare_documents": "data.prepare.prepare",
    "prepare_documents_from_args": "data.prepare.splits",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
