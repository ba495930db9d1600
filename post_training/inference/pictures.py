"""Prompts with pictures, as a model that sees takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import RowError
from data.images.pictures import encoded, inspect
from data.images.processor import ImageProcessor

Fields = Callable[[], Mapping[str, Tensor]]
"""Makes what a model takes beside a prompt: pixels of a whole file of rows are not held at once."""


class SeenPrompts:
    """Puts pictures into prompts.

    Args:
        processor: makes pixels; a text says why there is none.
    """

    def __init__(self, processor: ImageProcessor | str) -> None:
        self._found = processor

    def expand(
        self, ids: Sequence[int], sources: Sequence[Any], beside: str
    ) -> tuple[list[int], Fields]:
        """The tokens of a prompt, and what the model takes beside them.

        Args:
            ids: one image token for each picture.
            sources: the pictures, as the row holds them.
            beside: the row's file.

        Raises:
            RowError: a picture cannot be used, or the model sees none; also of what is returned.
        """
        processor = self._found
        if isinstance(processor, str):
            raise RowError("pictures or sound", f"the row has pictures, and {processor}")
        grids = [processor.layout.grid(*inspect(encoded(each, beside)[1])) for each in sources]
        row = np.array(ids, np.int32)
        row = np.repeat(row, processor.layout.repeats(row, grids))
        return row.tolist(), functools.partial(_fields, processor, row, sources, beside, grids)


def _fields(
    processor: ImageProcessor, row: Any, sources: Sequence[Any], beside: str, grids: Any
) -> dict[str, Tensor]:
    patches = [processor.patches(encoded(each, beside)[1])[0] for each in sources]
    return {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "mm_token_type_ids": torch.from_numpy(row == processor.layout.image_id).int(),
    }


def join(rows: Sequence[Mapping[str, Tensor]], length: int, device: Any) -> dict[str, Tensor]:
    """What the model takes beside prompts of one length; those without pictures are of text alone."""
    if not any(rows):
        return {}
    text = torch.zeros(length, dtype=torch.int32)
    fields = {
        name: torch.cat([row[name] for row in rows if row]).to(device)
        for name in ("pixel_values", "image_grid_thw")
    }
    kinds = torch.stack([row.get("mm_token_type_ids", text) for row in rows])
    return {**fields, "mm_token_type_ids": kinds.to(device)}
