"""Public measurements of memory and time, and what the planner says of them.

python tests/helpers/public_points.py      the table
"""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POINTS = Path(__file__).parents[1] / "post_training" / "layout" / "public_points.json"
GIB = 2**30
# Of Megatron's parser and of this project's, where the runs measured were Megatron's own.
OURS = {
    "lora": None,
    "hf_config": None,
    "draft": None,
    "task": None,
    "export_kd_teacher_load": None,
    "model_backend": "megatron",
    "fsdp_sharding": "full",
    "transformer_impl": "transformer_engine",
    "bf16": True,
    "use_distributed_optimizer": True,
}


@functools.cache
def megatron_defaults() -> dict[str, Any]:
    """What Megatron's own parser says of an empty command line."""
    import sys

    from megatron.training.arguments import parse_args

    previous, sys.argv = sys.argv, ["pretrain"]
    try:
        return vars(parse_args(ignore_unknown_args=True))
    finally:
        sys.argv = previous


def points() -> Iterator[tuple[dict[str, Any], Namespace]]:
    """Each public point, and the arguments of its run."""
    found = json.loads(POINTS.read_text())
    for point in found["points"]:
        flags = {**found["models"][point["model"]], **point["flags"]}
        size = {"world_size": point["devices"]}
        yield point, Namespace(**{**megatron_defaults(), **OURS, **flags, **size})


def memory_error(point: dict[str, Any], args: Namespace) -> float:
    """How far the formula is from a measured peak, as a share of it; no margin is added."""
    from post_training.layout.memory import stage_memory

    stages = stage_memory(args)
    if point.get("only_step"):
        stage = max(stages, key=lambda each: each.states)
        return stage.states / GIB / point["peak_gib"] - 1
    # Megatron's own files are written by the last rank; SimuMax names the largest of all.
    stage = stages[-1] if point["source"] == "golden" else max(stages, key=lambda s: s.allocated)
    return stage.allocated / GIB / point["peak_gib"] - 1


def time_error(point: dict[str, Any], args: Namespace, **efficiency: Any) -> float:
    """The same of a measured step's time."""
    from post_training.layout.step_time import DEVICES, step_seconds

    device = DEVICES[point["gpu"].lower()]
    return step_seconds(args, device, **efficiency) / point["step_s"] - 1


def main() -> None:
    """Print the table."""
    print(
        f"{'point':14} {'model':16} {'GPUs':9} {'GiB':>7} {'error':>7} {'step s':>7} {'error':>7}"
    )
    for point, args in points():
        time = (
            f"{point['step_s']:7.3f} {time_error(point, args):+7.1%}" if "step_s" in point else ""
        )
        print(
            f"{point['point']!s:14} {point['model']:16} {point['devices']:3}x{point['gpu']:5} "
            f"{point['peak_gib']:7.2f} {memory_error(point, args):+7.1%} {time} {point.get('kind', '')}"
        )


if __name__ == "__main__":
    from post_training import platform

    platform.apply()
    main()
