"""How a processor cuts pictures into patches and tokens, known from their width and height alone.

    picture 100 x 60  ->  resized 112 x 56  ->  grid 1 x 4 x 8 of patches  ->  8 tokens (2 x 2 patches each)

    ids        <start> <image> <end> What is it ?                    as the template writes them
    expanded   <start> <image> <image> ... <image> <end> What is it ?

This is the layout of Qwen2-VL, Qwen2.5-VL and Qwen3-VL and of every processor that gives ids,
`pixel_values` and `image_grid_thw` in their way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import RowError

# Of the longer side to the shorter: these processors refuse more.
MOST_ASPECT = 200
Grid = tuple[int, int]


@dataclass(frozen=True)
class ImageLayout:
    """What ids and positions of rows with pictures depend on; plain data, sent to workers.

    Attributes:
        processor: The processor's class, for messages.
        patch: Pixels of a patch on each side.
        merge: Patches of a token on each side.
        min_pixels: Pixels that a picture is enlarged to at least.
        max_pixels: Pixels that a picture is made smaller to at most.
        image_id: The token that stands for a picture.
        refused_ids: Tokens of other media, which no row may hold.
    """

    processor: str
    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    image_id: int
    refused_ids: tuple[int, ...] = ()

    def grid(self, height: int, width: int) -> Grid:
        """Patches of a picture of so many pixels, downwards and across.

        Both sides become the nearest multiples of a token's side; where their product is out of bounds,
        the sides are scaled alike, then rounded into the bounds (`smart_resize` of transformers 5,
        models/qwen2_vl).

        Raises:
            RowError: it is too narrow for the processor.
        """
        if max(height, width) > MOST_ASPECT * min(height, width):
            raise RowError(
                "bad picture",
                f"{width} x {height} pixels: {self.processor} takes sides of at most {MOST_ASPECT} to 1",
            )
        side = self.patch * self.merge
        pixels = height * width
        tall, wide = (round(length / side) for length in (height, width))
        area = tall * wide * side * side
        if area > self.max_pixels:
            # Divided twice, as the processor does it: one division rounds differently now and then.
            shrink = math.sqrt(pixels / self.max_pixels)
            tall, wide = (max(1, math.floor(n / shrink / side)) for n in (height, width))
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / pixels)
            tall, wide = (math.ceil(n * grow / side) for n in (height, width))
        return tall * self.merge, wide * self.merge

    def tokens(self, grid: Grid) -> int:
        """Tokens of a picture."""
        return grid[0] * grid[1] // self.merge**2

    def repeats(self, ids: npt.NDArray[np.int32], grids: Sequence[Grid]) -> npt.NDArray[np.int64]:
        """How often each token of a row stands in the expanded row: int64 ``[tokens]``.

        Args:
            ids: One image token for each picture, int32 ``[tokens]``.
            grids: Of the pictures in their order.

        Raises:
            RowError: pictures and image tokens do not fit.
        """
        places = np.flatnonzero(ids == self.image_id)
        if len(places) != len(grids):
            raise RowError(
                "pictures do not fit",
                f"the rendered row has {len(places)} image tokens for {len(grids)} pictures: the chat "
                "template leaves some out, or a text holds the token itself",
            )
        if any(np.count_nonzero(ids == other) for other in self.refused_ids):  # np.isin is slow
            raise RowError("pictures do not fit", "a text holds the token of a video or a sound")
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = [self.tokens(grid) for grid in grids]
        return repeats

    def positions(
        self, ids: npt.NDArray[np.integer], grids: Sequence[Grid]
    ) -> npt.NDArray[np.int64]:
        """Rotary positions of a document's tokens in time, downwards and across: int64 ``[tokens, 3]``.

        Text goes on by one in all three. A picture stands at one time; its tokens count rows and columns
        from there; what follows begins behind the longer side (Qwen2-VL, arXiv:2409.12191, section 2.1).

        Args:
            ids: Expanded, ``[tokens]``.
            grids: Of the pictures in their order.
        """
        positions = np.empty((len(ids), 3), np.int64)
        places = np.flatnonzero(ids == self.image_id)
        at = following = used = 0
        for grid in grids:
            begin, count = int(places[used]), self.tokens(grid)
            used += count
            positions[at:begin] = (following + np.arange(begin - at))[:, None]
            following += begin - at
            down, across = (side // self.merge for side in grid)
            inside = positions[begin : begin + count]
            inside[:, 0] = following
            inside[:, 1] = following + np.repeat(np.arange(down), across)
            inside[:, 2] = following + np.tile(np.arange(across), down)
            following += max(down, across)
            at = begin + count
        positions[at:] = (following + np.arange(len(ids) - at))[:, None]
        return positions
