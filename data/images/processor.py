"""The image processor of a HuggingFace folder: its layout, and pixels for the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import DataError, RowError
from data.images.layout import Grid, ImageLayout
from data.images.pictures import Picture, open_picture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FILES = ("preprocessor_config.json", "processor_config.json")
# Sizes at which a processor's own count of patches is compared with the layout's.
_TRIED = (
    (1, 1),
    (28, 29),
    (45, 1000),
    (333, 250),
    (481, 640),
    (1080, 1921),
    (4000, 3000),
    (37, 41),
)
_IMAGE_TOKEN, _OTHER_TOKENS = "<|image_pad|>", ("<|video_pad|>",)  # where config.json names none


@dataclass(frozen=True)
class ImageProcessor:
    """Makes pixels of pictures as documents keep them.

    Attributes:
        layout: Its layout.
        theirs: The image processor of transformers.
        cache: Folder of embedded pictures.
    """

    layout: ImageLayout
    theirs: Any
    cache: Path

    @cached_property
    def filler(self) -> torch.Tensor:
        """The patches of a picture of one token and of nothing: float32 ``[merge * merge, width]``, 0."""
        import torch

        width = 3 * self.theirs.temporal_patch_size * self.layout.patch**2
        return torch.zeros(self.layout.merge**2, width)

    def pixels(self, picture: Picture) -> torch.Tensor:
        """The patches of a picture, float32 ``[patches, width]``.

        Raises:
            DataError: it cannot be read or decoded, or has become another.
        """
        try:
            pixels, grid = self.patches(picture.read(self.cache))
        except RowError as error:
            raise DataError(f"{picture.file}: {error}") from error
        if grid != picture.grid:
            raise DataError(
                f"{picture.file}: {self.layout.processor} makes a grid of {grid}, its tokens are for "
                f"{picture.grid}."
            )
        return pixels

    def patches(self, data: bytes) -> tuple[torch.Tensor, Grid]:
        """The patches of an encoded picture, float32 ``[patches, width]``, and their grid.

        Raises:
            RowError: it cannot be decoded.
        """
        try:
            image = open_picture(data)
        except Exception as error:  # whatever the format's reader makes of damaged bytes
            raise RowError("broken picture", f"it cannot be decoded ({error})") from error
        found = self.theirs(images=[np.asarray(image)], input_data_format="channels_last",
                            return_tensors="pt")  # fmt: skip
        _, down, across = found["image_grid_thw"][0].tolist()
        return found["pixel_values"], (down, across)


def open_processor(
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> ImageProcessor | str:
    """The image processor beside a tokenizer; where there is none of use, why.

    Args:
        tokenizer: Whose folder or hub name is looked into.
        cache: Folder of embedded pictures.
        min_pixels: Of a picture at least; None for the processor's own.
        max_pixels: At most.

    Raises:
        DataError: the bounds are none.
    """
    name = tokenizer.name_or_path
    if not any(_find(name, file) for file in _FILES):
        return f"the model {name!r} has no image processor ({_FILES[0]}): it reads text alone"
    from transformers import AutoImageProcessor
    from transformers.image_utils import SizeDict

    try:
        theirs = AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError, TypeError, LookupError, ImportError, AttributeError) as error:
        return f"the image processor of {name!r} cannot be loaded ({str(error).splitlines()[0]})"
    kind = type(theirs).__name__
    unknown = (
        f"the image processor {kind} cuts pictures in a way that is not known here; known are those of "
        "Qwen2-VL, Qwen2.5-VL and Qwen3-VL and of their kind (ids, pixel_values and image_grid_thw)"
    )
    size = getattr(theirs, "size", None)
    own: list[Any] = [getattr(size, edge, None) for edge in ("shortest_edge", "longest_edge")]
    sides: list[Any] = [getattr(theirs, part, None) for part in ("patch_size", "merge_size")]
    counts = getattr(theirs, "get_number_of_image_patches", None)
    if counts is None or not all(isinstance(number, int) for number in (*own, *sides)):
        return unknown
    low, high = min_pixels or own[0], max_pixels or own[1]
    if min_pixels is None:
        low = min(low, high)
    token = (sides[0] * sides[1]) ** 2
    if not 0 < low <= high or high < token:
        raise DataError(
            f"--min-pixels {low} and --max-pixels {high}: expected 1 <= min <= max, and a token of "
            f"{kind} has {token} pixels."
        )
    theirs.size = SizeDict(shortest_edge=low, longest_edge=high)
    config = _find(name, "config.json")
    image_id, others = _tokens(tokenizer, config)
    if image_id is None:
        return f"the tokenizer {name!r} has no token that stands for a picture ({_IMAGE_TOKEN})"
    layout = ImageLayout(kind, sides[0], sides[1], low, high, image_id, others)
    for height, width in _TRIED:
        down, across = layout.grid(height, width)
        if counts(height, width, {"min_pixels": low, "max_pixels": high}) != down * across:
            return unknown
    return ImageProcessor(layout, theirs, cache)


def _find(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _tokens(
    tokenizer: PreTrainedTokenizerBase, config: Path | None
) -> tuple[int | None, tuple[int, ...]]:
    """The token of a picture, and those of other media; None where none is known."""
    said = json.loads(config.read_text(encoding="utf-8")) if config else {}
    vocabulary = tokenizer.get_vocab()
    image = said.get("image_token_id", vocabulary.get(_IMAGE_TOKEN))
    others = {said.get(f"{kind}_token_id") for kind in ("video", "audio")}
    others |= {vocabulary.get(token) for token in _OTHER_TOKENS}
    return image, tuple(sorted(other for other in others if isinstance(other, int)))
