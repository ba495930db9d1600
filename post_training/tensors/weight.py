"""One parameter of a model, and where it lies in HuggingFace files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["replicated", "vocabulary", "qkv", "rows", "gate_up", "columns"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter, and the HuggingFace tensors that make it up."""

    layout: Layout
    """How the tensors are joined and split over the tensor parallel group."""
    tensors: Shapes
    """Shapes of the HuggingFace tensors by their names, in the order in which they are joined."""
    groups: int = 1
    """Query groups by which the rows of `qkv` are interleaved."""
    sections: tuple[int, ...] = ()
    """Rows of the parts of its one tensor, each of which is split for itself; empty: a tensor is a part."""
    of_expert: bool = False
    """Split over the expert tensor parallel group instead."""
    expert: int | None = None
    """Its place in tensors that hold every expert. Their matrices stand transposed, and the columns of gate
    and up in turn."""


Weights = dict[str, Weight]
