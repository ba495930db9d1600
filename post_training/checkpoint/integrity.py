"""Whether the files of a checkpoint hold what was saved."""

from __future__ import annotations

import json
from pathlib import Path

METADATA = ".metadata"


def contents_defect(checkpoint: Path) -> str | None:
    """Compare the files of a `torch_dist` or `torch_dcp` checkpoint with its own table of contents.

    Returns:
        What is unreadable, cut off or missing, or None.
    """
    if not (checkpoint / METADATA).is_file():
        return None if any(checkpoint.iterdir()) else "it is empty"
    from torch.distributed.checkpoint import FileSystemReader

    name = METADATA
    try:
        contents = FileSystemReader(checkpoint).read_metadata().storage_data
        name = "metadata.json"  # in `torch_dist` only
        if (checkpoint / name).exists():
            json.loads((checkpoint / name).read_bytes())
    except Exception as error:  # noqa: BLE001 - whatever unpickling garbage meets
        return f"{name} cannot be read ({type(error).__name__})"
    ends: dict[str, int] = {}
    for info in contents.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    for name, end in ends.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else 0
        if found < end:
            return f"{name} has {found} of {end} bytes"
    return None
