"""The best evaluation of a run: its checkpoint is kept, and long without a better one training ends.

`--early-stop-metric` names a number of the evaluations on the validation data (`metrics.jsonl`). At each
better one a checkpoint is saved, which no `--keep-checkpoints` removes; `best.json` in the output folder
names it. Where a run goes on from is read from the evaluations that it has written down.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from post_training.checkpoint import store
from post_training.errors import RunStopped
from post_training.metrics.records import read_records
from post_training.metrics.run_log import RunLog
from post_training.platform.training_hooks import hooks

BEST = "best.json"


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss by its name; all others are shares of what is right."""
    name = metric.partition("/")[0]  # behind it stands what a kind of rows is called
    return "loss" in name or "perplexity" in name


class EarlyStopping:
    """Looks at every evaluation on the validation data; all ranks see the same numbers."""

    def __init__(self, args: argparse.Namespace, run_log: RunLog) -> None:
        """Register with the run's log.

        Args:
            args: validated arguments, with `early_stop_metric`.
            run_log: tells of evaluations, and says what was decided.
        """
        self.args, self.run_log = args, run_log
        self.best: tuple[int, float] | None = None
        """Step and value."""
        self.without = 0
        """Evaluations since then."""
        run_log.on_validation.append(self.look)

    def continue_from(self, iteration: int) -> None:
        """Take over what the run has found up to `iteration`; all ranks take part."""
        told: list[Any] = [None]
        file = self.run_log.metrics_file
        if self.args.rank == 0 and iteration and file.is_file():
            told[0] = [
                (record["iteration"], record[self.args.early_stop_metric])
                for _, record in read_records(file)
                if record.get("split") == "valid"
                and record["iteration"] <= iteration
                and record.get(self.args.early_stop_metric) is not None
            ]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(told, src=0)
        for step, value in told[0] or []:
            self._count(step, value)

    def look(self, record: dict[str, Any]) -> None:
        """Judge an evaluation, and ask for a checkpoint or for the end.

        Raises:
            RunStopped: on all ranks, when evaluations have no such number.
        """
        metric, iteration = self.args.early_stop_metric, record["iteration"]
        if iteration == 0:
            return  # --eval-at-start: there is no checkpoint of it
        value = record.get(metric)
        if not isinstance(value, int | float):
            there = ", ".join(
                key
                for key, each in record.items()
                if isinstance(each, int | float) and key not in ("iteration", "seconds", "tokens")
            )
            raise RunStopped(
                f"--early-stop-metric {metric}: evaluations have {there}, and no such number"
            )
        if self._count(iteration, float(value)):
            hooks.save_wanted = True
            return
        patience = self.args.early_stop_patience
        if patience and self.without >= patience and self.best is not None:
            hooks.end_wanted = True
            self.run_log.progress.message(
                f"no better {metric} in {self.without} evaluations: ending after step {iteration}; the "
                f"best was {self.best[1]:.6g} at step {self.best[0]}"
            )

    def _count(self, iteration: int, value: float) -> bool:
        """Whether a value is the best so far."""
        sign = -1.0 if lower_is_better(self.args.early_stop_metric) else 1.0
        better = math.isfinite(value) and (self.best is None or sign * value > sign * self.best[1])
        if better:
            self.best, self.without = (iteration, value), 0
        else:
            self.without += 1
        return better

    @property
    def best_iteration(self) -> int | None:
        """The step whose checkpoint is to be kept."""
        return None if self.best is None else self.best[0]

    def write(self, iteration: int) -> None:
        """On rank 0, once the checkpoint of `iteration` is complete, say where the best one is."""
        if self.best is None or self.best[0] != iteration:
            return
        facts = {
            "metric": self.args.early_stop_metric,
            "value": self.best[1],
            "iteration": iteration,
            "checkpoint": str(store.checkpoint_path(self.args.save, iteration)),
        }
        file = Path(self.args.output_dir) / BEST
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
