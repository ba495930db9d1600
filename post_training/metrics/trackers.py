"""Weights & Biases and MLflow: a run that goes on continues the record that it began."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from post_training.files import DERIVED, config_of_run

# In the output folder: the names under which the trackers know the run.
IDS = "trackers.json"


def _ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(folder: Path, tracker: str, name: str) -> None:
    (folder / IDS).write_text(json.dumps(_ids(folder) | {tracker: name}) + "\n", encoding="utf-8")


def continue_wandb(args: argparse.Namespace) -> None:
    """Have Megatron, which opens wandb on the last rank, open the run that this output folder began."""
    if not args.wandb_project or args.rank != args.world_size - 1 or "WANDB_RUN_ID" in os.environ:
        return
    import wandb

    folder = Path(args.output_dir)
    name = _ids(folder).get("wandb") or secrets.token_hex(8)
    _keep(folder, "wandb", name)
    # The environment has been read already, when credentials were looked for.
    wandb.setup(wandb.Settings(run_id=name, resume="allow"))


class MlflowRun:
    """The run of `--mlflow-experiment`, on rank 0; where its server fails, training goes on without it."""

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        """Open a run, or the one that this output folder began.

        Args:
            args: validated arguments; without MLFLOW_TRACKING_URI the record lies in the output folder.
            say: told once when nothing can be logged.
        """
        # Seven with growing pauses are the default: minutes in which no step is taken.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient

        self.say = say
        folder = Path(args.output_dir).absolute()
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self.run: str | None = _ids(folder).get("mlflow")
        self.client: Any = None
        try:
            self.client = MlflowClient(place)
            if self.run is None:
                name = args.mlflow_experiment
                experiment = self.client.get_experiment_by_name(name)
                number = (
                    experiment.experiment_id if experiment else self.client.create_experiment(name)
                )
                self.run = str(self.client.create_run(number, run_name=folder.name).info.run_id)
                _keep(folder, "mlflow", self.run)
                written = config_of_run(folder)
                for key in sorted(written.keys() - written.pop(DERIVED, [])):
                    self.client.log_param(self.run, key, str(written[key])[:500])
            self.client.update_run(self.run, status="RUNNING")
        except Exception as error:  # noqa: BLE001 - whatever a server or its client raises
            self._give_up(error)

    def log(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send numbers of a step."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, iteration)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        try:
            self.client.log_batch(self.run, metrics=metrics)
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def finish(self, *, failed: bool) -> None:
        """Say how the run ended; another start opens it again."""
        if self.client is None:
            return
        try:
            self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.client = None
        self.say(f"mlflow: nothing is logged any more ({' '.join(str(error).split())[:200]})")
