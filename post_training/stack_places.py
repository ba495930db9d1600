"""Where a thread stands, in one line, and whether it waits for other ranks there."""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).resolve().parent.parent)

# Lines on which a rank waits for others, or for its device, which does. On a GPU these are the ones that
# ask for a number, a size or a copy on the host; any other may wait for room in the queue of kernels.
_WAITING = re.compile(
    r"\.wait\(|\.item\(|\.tolist\(|\.cpu\(|\.to\(|\.numpy\(|synchronize\(|barrier\(|run_backward\(|"
    r"\.backward\(|\.isend|\.irecv|\.query\(|nonzero\(|masked_select\(|\.any\(|\.all\(|isfinite\(|"
    r"\b(float|int|bool)\("
)


@dataclass(frozen=True)
class Place:
    """Where a thread stands."""

    text: str
    waits: bool
    """It waits for another rank, as far as the line of code tells."""


def place_of(frame: FrameType | None) -> Place:
    """The innermost place of a stack, and from where in this project it was called."""
    if frame is None:
        return Place("an unknown place", False)
    file = frame.f_code.co_filename
    line = linecache.getline(file, frame.f_lineno)
    waits = "torch/distributed/" in file or _WAITING.search(line) is not None
    text = _described(frame)
    outer: FrameType | None = frame
    while outer is not None and not _is_ours(outer):
        outer = outer.f_back
    if outer is not None and outer is not frame:
        text += f", from {_described(outer)}"
    return Place(text, waits)


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(ROOT) and "site-packages" not in file


def _described(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    short = (
        file.removeprefix(ROOT + "/") if _is_ours(frame) else file.rpartition("site-packages/")[2]
    )
    return f"{frame.f_code.co_name} ({short}:{frame.f_lineno})"
