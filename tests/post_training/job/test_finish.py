"""What is said when a run ends before the last step."""

import argparse
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from post_training.errors import RunStopped, SetupError
from post_training.job.finish import report_end


@pytest.mark.parametrize("received", [None, signal.SIGTERM])
@pytest.mark.parametrize("save_hf", [True, False])
def test_a_stopped_run_says_how_to_go_on_and_how_to_export(received, save_hf):
    args = argparse.Namespace(
        rank=0,
        eval_only=False,
        output_dir="runs/my run",
        save="runs/my run/checkpoints",
        train_iters=6,
        save_hf=save_hf,
    )
    console = io.StringIO()
    graceful: Any = SimpleNamespace(received=received)
    report_end(args, console, graceful, 4, Path("/project/scripts/export_hf.py"))
    stopped, again, *export = console.getvalue().splitlines()
    assert stopped.startswith("stopped after step 4 of 6 (" + ("SIG" if received else "told to"))
    assert again == "to continue, give the same command again"
    if save_hf:
        assert export[0].startswith("--save-hf exports at the end of training; to export")
        assert export[1:] == ["python scripts/export_hf.py --output-dir 'runs/my run'"]
    else:
        assert not export


@pytest.mark.parametrize(
    ("ending", "error"),
    [("sys.exit(2)", SetupError), ("os.kill(os.getpid(), 15)", RunStopped), ("1 / 0", RunStopped)],
)
def test_an_export_that_a_signal_ends_is_done_again_by_who_supervises(
    tmp_path, monkeypatch, ending, error
):
    monkeypatch.setenv("SFT_OUTCOME", str(tmp_path / "outcome.json"))
    exporter = tmp_path / "scripts" / "export_hf.py"
    exporter.parent.mkdir()
    exporter.write_text(f"import os, sys\n{ending}\n")
    args = argparse.Namespace(
        rank=0, eval_only=False, output_dir="out", save="out", train_iters=6, save_hf=True
    )
    with (tmp_path / "console").open("w") as console, pytest.raises(error, match="--save-hf"):
        report_end(args, console, SimpleNamespace(received=None), 6, exporter)  # type: ignore[arg-type]
    assert not os.path.exists(os.environ["SFT_OUTCOME"])
