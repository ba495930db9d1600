"""What checkpoints of versions before name as their data: token caches, by what those were made from."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import suppress
from pathlib import Path

from data.documents.documents import (
    MANIFEST,
    Documents,
    cache_manifest,
    map_documents,
    open_documents,
)
from data.documents.mixture import DocumentSet
from data.errors import DataError

# Combinations of equal caches that are tried for the parts of a mixture.
_MOST_TRIED = 1 << 16


def cache_has_documents(
    cache_dir: Path, fingerprint: str, documents: Documents | DocumentSet
) -> bool | None:
    """Whether the caches that a fingerprint was made from have these documents.

    The fingerprint of a mixture or split was a hash of the names of its parts' caches and of the flags
    that chose from them, so of these only equal caches can be found.

    Args:
        cache_dir: Folder of caches.
        fingerprint: Of the documents that a checkpoint of a version before was saved with.
        documents: Those of today.

    Returns:
        None where there is no such cache.

    Raises:
        DataError: a cache is damaged.
    """
    if isinstance(documents, Documents):
        folder = cache_dir / fingerprint
        if not (folder / MANIFEST).is_file():
            return None
        return open_documents(folder).contents == documents.contents
    equal = [_equal_caches(cache_dir, part) for part in documents.parts]
    for names in itertools.islice(itertools.product(*equal), _MOST_TRIED):
        text = "".join(
            f"{name} {flags}" for name, flags in zip(names, documents.chosen_by, strict=True)
        )
        if hashlib.sha256(text.encode()).hexdigest()[:32] == fingerprint:
            return True
    return None


def _equal_caches(cache_dir: Path, part: Documents) -> list[str]:
    """Names of the caches with the documents of ``part``."""
    sizes = len(part), int(part.offsets[-1])
    names = []
    for file in sorted(cache_dir.glob(f"*/{MANIFEST}")):
        folder = file.parent
        with suppress(DataError):  # a damaged cache, or one of another format, is as good as none
            manifest = cache_manifest(folder)
            if (manifest["documents"], manifest["tokens"]) == sizes:
                if map_documents(folder, manifest).contents == part.contents:
                    names.append(folder.name)
    return names
