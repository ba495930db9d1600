"""The check sum of a file that may be large: of caches, and of checkpoints."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

# Larger files are not read as a whole for their check sums: one piece of each stretch, and the last piece.
_WHOLE, _STRETCH, _PIECE = 256 << 20, 64 << 20, 1 << 20


def check_sum(path: Path, *, whole: bool = False) -> int:
    """CRC-32 of the whole file, or of a large one the begin of each stretch and the end.

    Args:
        path: the file.
        whole: of all of it, however large.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE or whole:
            places = [*range(0, size, _PIECE)]
        else:
            places = [*range(0, size, _STRETCH), size - _PIECE]
        found = 0
        for place in places:
            file.seek(place)
            found = zlib.crc32(file.read(_PIECE), found)
    return found
