"""With the real packages where they are installed; MLflow writes into a file, wandb works offline."""

import json
import sys
from argparse import Namespace

import pytest

from post_training.metrics.trackers import IDS, MlflowRun, continue_wandb


@pytest.fixture
def args(tmp_path):
    (tmp_path / "config.yaml").write_text("derived_flags: [seed]\nlr: 1.0e-05\nseed: 7\n")
    return Namespace(
        output_dir=str(tmp_path), mlflow_experiment="exp", wandb_project="p", rank=1, world_size=2
    )


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(args, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    for number in (1, 2):
        run = MlflowRun(args, said.append)
        run.log({"lm_loss": 3.0 / number, "sources": {"a": 1}, "skipped": None}, number)
        run.finish(failed=number == 1)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    history = client.get_metric_history(found.info.run_id, "lm_loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 1.5)] and not said
    assert found.info.status == "FINISHED" and found.data.params == {"lr": "1e-05"}


def test_a_server_that_is_gone_ends_no_run(args, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    run = MlflowRun(args, said.append)
    run.log({"lm_loss": 1.0}, 1)
    run.finish(failed=False)
    assert len(said) == 1 and said[0].startswith("mlflow: nothing is logged any more (")


def test_a_resumed_run_goes_on_in_the_same_wandb_run(args, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = []
    for _ in range(2):
        wandb.setup()  # as when credentials are looked for
        continue_wandb(args)
        run = wandb.init(project="p", dir=str(tmp_path))
        names.append(run.id)
        run.finish()
        wandb.teardown()
    assert names[0] == names[1] == json.loads((tmp_path / IDS).read_text())["wandb"]


def test_only_the_rank_that_has_wandb_open_names_the_run(args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    args.rank = 0
    continue_wandb(args)
    assert not (tmp_path / IDS).exists()
