"""One start of a run that is started again and again: progress or stop, and mistakes are not retried.

What SLURM's batch script (`slurm.py`) and Ray's driver (`launch_ray.py`) share. Only the standard library,
and Python 3.9: a batch script runs on the host, and all else may lie in a container.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Runs one command of the run's own words on the cluster, and returns its status and what it has told
# (`post_training/machine/outcome.py`): {} where nobody has.
#
#   prepare   one process without devices checks the flags, prepares the data, finds the newest checkpoint
#   health    the machines are looked at
#   run       the run itself, on all nodes
Step = Callable[[str, list[str]], tuple[int, dict[str, Any]]]
# Flags with which a script ends at once, before there is anything to go on with.
_ENDS_AT_ONCE = {"-h", "--help", "--help-all", "--version", "--only"}
# How a job ends by what became of its last start.
STATUS = {"complete": 0, "refused": 2, "no progress": 3, "again": 1}


@dataclass(frozen=True)
class Ending:
    """What became of a start: a key of `STATUS`, and the reason in words."""

    verdict: str
    reason: str


def launcher_variables(processes: int, here: int) -> dict[str, str]:
    """Lets one process check and prepare what `processes` will run, as rank 0 of them, without GPUs."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here}
    words = {name: str(value) for name, value in ranks.items()}
    return {**words, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}


def read_outcome(file: Path) -> dict[str, Any]:
    """What a step has told; {} where it has not."""
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def attempt(step: Step, flags: list[str], seen: list[int], record: Callable[[], object]) -> Ending:
    """Prepare the data, look for progress since the last starts, look at the machines, and run.

    Args:
        step: runs one of the three on as many nodes as it needs.
        flags: of the script.
        seen: the newest checkpoint (or complete shards) that each start has found; this one's is added.
        record: keeps `seen` for the next start.
    """
    if early := [word for word in flags if word.partition("=")[0] in _ENDS_AT_ONCE]:
        return Ending("refused", f"{early[0]}: nothing is trained with it; leave it out")
    status, told = step("prepare", [*flags, "--only", "prepare"])
    if told.get("outcome") == "refused" or status == 2:
        return Ending("refused", "the flags or the data are refused; its log has the line")
    seen.append(int(told.get("progress", max(seen, default=0))))
    record()
    # One restart may be unlucky, as where it was ended before its first checkpoint; two are no accident.
    if len(seen) > 2 and seen[-1] <= seen[-3]:
        return Ending(
            "no progress", f"two restarts found no newer checkpoint than that of step {seen[-1]}"
        )
    if status or "progress" not in told:
        return Ending("again", f"preparing the data ended with status {status}")
    status, told = step("health", [])
    if status:
        return Ending("again", f"the health check failed: {told.get('reason') or 'see its log'}")
    status, told = step("run", flags)
    return judge(status, told)


def judge(status: int, told: Mapping[str, Any]) -> Ending:
    """What became of a run, by its status and what it has told; the latter counts where there is any."""
    outcome = told.get("outcome")
    if outcome == "refused":
        return Ending("refused", "the run has refused its flags or data; its log has the line")
    if outcome == "complete":
        return Ending("complete", "complete")
    if outcome == "stopped":
        return Ending("again", f"stopped after step {told.get('step')} ({told.get('reason')})")
    return Ending("again", f"the run ended with status {status}, before it was complete")
