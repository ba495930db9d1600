"""The documents of one chunk, on their way from where they are tokenised to a cache; plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Begins the names of counts of rows that hold what nobody reads.
UNREAD = "unread: "


@dataclass
class Shard:
    """The documents of one chunk.

    Attributes:
        input_ids: int32 ``[tokens]``.
        loss_mask: uint8 ``[tokens]``.
        lengths: int64 ``[documents]``.
        provenance: int64 ``[documents, 2]``: source and row number.
        hashes: uint64 ``[documents]``: hash of each document's tokens.
        counts: Rows read, kept and dropped by reason, turns, tokens.
        bad_rows: (place, reason, detail) of rows that were skipped.
        error: The message of a row that stops the run.
        pictures: Texts of a `PictureTable`; empty for a model of text.
        picture_sizes: int32 ``[documents]``, bytes of each; empty for a model of text.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    provenance: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    counts: dict[str, int]
    bad_rows: list[tuple[str, str, str]]
    error: str | None = None
    pictures: bytes = b""
    picture_sizes: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
