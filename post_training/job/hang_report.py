"""Which rank hangs: who has come least far, and where the main thread of each stands."""

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
    """The ranks that do not answer, else those that have come least far; and where all stand.

    Args:
        states: what each rank has noted, by rank: `phase` (in words), and where it has answered `place`
            (as `place_of`), `phases` and `beats` (counts since its start) and `stage` (of the pipeline).

    Returns:
        Several lines.
    """
    silent = [rank for rank, state in states.items() if "place" not in state]
    known = {rank: state for rank, state in states.items() if rank not in silent}
    behind = silent or _behind(known)
    one = len(behind) == 1
    if silent:
        verdict = f"{_ranks(silent)} {'does' if one else 'do'} not answer"
    elif behind:
        verdict = f"{_ranks(behind)} {'has' if one else 'have'} come least far"
    else:
        verdict = "all ranks have come equally far"
    lines = [
        f"  rank {rank} was {states[rank].get('phase', 'not seen')}: its process is stopped, or its "
        f"machine is gone"
        for rank in silent
    ]
    places: dict[tuple[bool, str], list[int]] = {}
    for rank, state in sorted(known.items(), key=lambda each: each[0] not in behind):
        place = f"{state['phase']}: {state['place']}"
        places.setdefault((rank in behind, place), []).append(rank)
    lines += [f"  {_ranks(ranks)} {place}" for (_, place), ranks in places.items()]
    return "\n".join([f"{verdict}:", *lines])


def _behind(states: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Ranks that have come less far than others.

    All go through the same phases: steps, evaluations, saves. Within one, ranks of the same pipeline stage
    beat equally often; a stage that waits for another may have beaten less.

    Args:
        states: what each rank that answers has noted, by rank.
    """
    first = min((state["phases"] for state in states.values()), default=0)
    behind = [rank for rank, state in states.items() if state["phases"] == first]
    if len(behind) < len(states):
        return behind
    most: dict[int, int] = {}
    for state in states.values():
        most[state["stage"]] = max(state["beats"], most.get(state["stage"], 0))
    behind = [rank for rank, state in states.items() if state["beats"] < most[state["stage"]]]
    fewest = min((states[rank]["beats"] for rank in behind), default=0)
    return [rank for rank in behind if states[rank]["beats"] == fewest]


def _ranks(numbers: list[int]) -> str:
    """Numbers of ranks in words, the first 16 of them."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(str(number) for number in numbers[:16])
    return f"ranks {shown}" + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
