"""Which rank hangs: who does not answer, and where the main thread of each other stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])


def place_of(frame: FrameType | None) -> str:
    """The innermost place of a stack, and from where in this project it was called."""
    if frame is None:
        return "an unknown place"
    text = _described(frame)
    outer: FrameType | None = frame
    while outer is not None and not _is_ours(outer):
        outer = outer.f_back
    return text if outer in (None, frame) else f"{text}, from {_described(outer)}"


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(ROOT) and "site-packages" not in file


def _described(frame: FrameType) -> str:
    file = frame.f_code.co_filename.removeprefix(ROOT + "/").rpartition("site-packages/")[2]
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def hang_report(states: Mapping[int, Mapping[str, Any]]) -> str:
    """The ranks that do not answer, and where the others stand, the fewest first.

    Args:
        states: what each rank has noted, by rank: `phase` (in words), and where it has answered `place`
            (as `place_of`).

    Returns:
        Several lines.
    """
    silent = [rank for rank, state in states.items() if "place" not in state]
    verdict = f"No answer of {_ranks(silent)}" if silent else "All ranks answer"
    lines = [
        f"  rank {rank} was {states[rank].get('phase', 'not seen')}: its process is stopped, or its "
        f"machine is gone"
        for rank in silent
    ]
    places: dict[str, list[int]] = {}
    for rank, state in states.items():
        if rank not in silent:
            places.setdefault(f"{state['phase']}: {state['place']}", []).append(rank)
    by_number = sorted(places.items(), key=lambda each: len(each[1]))
    return "\n".join([f"{verdict}:", *lines, *(f"  {_ranks(r)} {place}" for place, r in by_number)])


def _ranks(numbers: list[int]) -> str:
    """Numbers of ranks in words, the first 16 of them."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(str(number) for number in numbers[:16])
    return f"ranks {shown}" + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
