"""Which rank hangs, from what all ranks tell of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def who_hangs(states: Mapping[int, Mapping[str, Any]]) -> str:
    """The rank that the others wait for, and where all stand.

    Who has come least far is a fact. Whether a line of code waits for others is a guess, which is taken
    where the fact tells nothing: on a GPU any line that launches a kernel may wait.

    Args:
        states: what each rank has noted, by rank: `phase` (in words), and where it has told where it stands
            `place`, `waits` (as `stack_places.Place`), `phases` and `beats` (counts since its start) and
            `stage` (of the pipeline).

    Returns:
        Several lines.
    """
    silent = [rank for rank, state in states.items() if "place" not in state]
    known = {rank: state for rank, state in states.items() if rank not in silent}
    least = _behind(known)
    suspects = [rank for rank in least or known if not known[rank]["waits"]]
    hung = silent or suspects or least
    sure = bool(silent) or hung == least
    lines = []
    for rank in hung:
        state = states[rank]
        if rank in silent:
            lines.append(
                f"  rank {rank} does not answer: its process is stopped, or its machine is gone; it "
                f"was {state.get('phase', 'not seen')}"
            )
        else:
            hangs = "has come least far," if state["waits"] else "hangs"
            lines.append(f"  rank {rank} {hangs} {state['phase']}: {state['place']}")
    waiting: dict[str, list[int]] = {}
    for rank, state in known.items():
        if rank not in hung:
            waiting.setdefault(f"{state['phase']}: {state['place']}", []).append(rank)
    for text, ranks in waiting.items():
        lines.append(f"  {ranks_text(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {text}")
    if not hung:
        lines.insert(0, "  all ranks wait for each other")
        return "\n".join(lines).strip()
    verb = ("is", "are") if sure else ("seems to be", "seem to be")
    return "\n".join([f"{ranks_text(hung)} {verb[len(hung) > 1]} behind it:", *lines])


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


def ranks_text(numbers: list[int]) -> str:
    """Numbers of ranks in words, the first 16 of them."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(str(number) for number in numbers[:16])
    return f"ranks {shown}" + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
