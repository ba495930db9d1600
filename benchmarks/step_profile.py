"""Where a training step's time goes: the operations of finetune.py's steps by their own time.

python benchmarks/step_profile.py --hf-model DIR --finetune-data-files FILE ... (flags of finetune.py)

Steps after the third are profiled, on one process.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

import finetune
from post_training.platform.training_hooks import Step, hooks

WARM_UP, ROWS = 3, 16


def main() -> int:
    """Train, and print the table; returns finetune.py's exit status."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, acc_events=True)
    console = os.fdopen(os.dup(1), "w")  # finetune.py sends what is printed to train.log
    steps = 0

    def on_step(step: Step) -> None:
        nonlocal steps
        steps = step.iteration - WARM_UP
        if steps == 0:
            profiler.start()

    hooks.on_step.append(on_step)
    status = finetune.main(sys.argv[1:])
    if steps < 1:
        print(f"profiled nothing: --train-iters must be above {WARM_UP}", file=sys.stderr)
        return status or 2
    profiler.stop()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in found)
    print(f"{'operation':44} {'ms/step':>9} {'share':>7} {'calls/step':>11}", file=console)
    for event in found[:ROWS]:
        spent = event.self_cpu_time_total
        print(
            f"{event.key[:44]:44} {spent / steps / 1000:9.2f} {spent / whole:7.1%} "
            f"{event.count / steps:11.0f}",
            file=console,
        )
    print(f"{'all operations':44} {whole / steps / 1000:9.2f}", file=console, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
