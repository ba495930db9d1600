"""Models that see: which class computes one, where its tower is, and positions in three dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from data.images.layout import ImageLayout
from post_training.errors import RunStopped, SetupError


def has_three_axes(model: Any) -> bool:
    """Whether rotary positions count time, rows and columns of pictures (Qwen2-VL and its kind)."""
    return any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "model", None)))


def with_axes(positions: Tensor, axes: Tensor | None) -> Tensor:
    """Positions as such a model takes them for packs.

    Args:
        positions: in the document: int64 [rows, length]. Where they begin anew documents do.
        axes: rotary positions int64 [rows, length, 3]; None: of text, where all are alike.

    Returns:
        int64 [4, rows, length].
    """
    rotary = positions.expand(3, -1, -1) if axes is None else axes.permute(2, 0, 1)
    return torch.cat([positions.unsqueeze(0), rotary])


def sample_picture(config: Any) -> dict[str, Tensor]:
    """What a model takes of a picture of one token, of no particular sight; empty for a model of text."""
    seen = getattr(config, "vision_config", None)
    known = hasattr(seen, "spatial_merge_size") and hasattr(seen, "temporal_patch_size")
    if seen is None or not known or not hasattr(config, "image_token_id"):
        return {}
    merge = seen.spatial_merge_size
    width = 3 * seen.temporal_patch_size * seen.patch_size**2
    patches = torch.linspace(-1.0, 1.0, merge**2 * width).view(merge**2, width)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, merge, merge]])}


def check_positions(model: Any) -> None:
    """See that a model places pictures as the packs say.

    Raises:
        RunStopped: its own positions of a small row are others.
    """
    owner: Any = model if hasattr(model, "get_rope_index") else getattr(model, "model", None)
    if not hasattr(owner, "get_rope_index"):
        return
    merge = model.config.vision_config.spatial_merge_size
    layout = ImageLayout("", 1, merge, 1, 1, model.config.image_token_id)
    grids = [(2 * merge, 3 * merge), (merge, 4 * merge)]
    others = [token for token in range(3) if token != layout.image_id]
    ids = [*others, *[layout.image_id] * 6, *others, *[layout.image_id] * 4, *others]
    row = torch.tensor([ids])
    known = {
        "input_ids": row,
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "mm_token_type_ids": (row == layout.image_id).int(),
    }
    takes = inspect.signature(owner.get_rope_index).parameters
    theirs, _ = owner.get_rope_index(**{name: known[name] for name in known if name in takes})
    ours = torch.from_numpy(layout.positions(row[0].numpy(), grids)).T
    if not torch.equal(theirs[:, 0], ours):
        raise RunStopped(
            f"{type(model).__name__} gives pictures other rotary positions than Qwen2-VL and its kind: it "
            f"cannot be trained on pictures here. Nothing was trained"
        )


def towers(model: Any) -> Iterator[nn.Module]:
    """The parts of a model that see, merger of patches included."""
    kind = type(getattr(model.config, "vision_config", None))
    if kind is not type(None):
        for module in model.modules():
            if module is not model and isinstance(getattr(module, "config", None), kind):
                yield module
                return


def freeze(model: Any, part: str | None) -> None:
    """Leave a part of a model as it is.

    Args:
        model: of `transformers`.
        part: `vision`, or None for nothing.

    Raises:
        SetupError: it has no such part.
    """
    if part is None:
        return
    found = list(towers(model))
    if not found:
        raise SetupError(f"--freeze {part}: {type(model).__name__} has no such part")
    for tower in found:
        tower.requires_grad_(False)
