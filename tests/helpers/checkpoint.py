"""What a checkpoint holds, read without the project's own code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a distributed checkpoint by name, in one process."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return state


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit: weights and optimizer."""
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def newest_whole(folder: Path) -> int:
    """The highest iteration of which every file that its manifest lists is there whole; 0 for none."""
    newest = 0
    for manifest in folder.glob("iter_*[0-9]/manifest.json"):
        try:
            files = json.loads(manifest.read_text())["files"]
            whole = all((manifest.parent / f).stat().st_size == size for f, size in files.items())
        except (OSError, ValueError):
            continue
        if whole and files:
            newest = max(newest, int(manifest.parent.name.removeprefix("iter_")))
    return newest
