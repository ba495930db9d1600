"""How a run ends: what is said, and the export to HuggingFace."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from post_training.errors import SetupError
from post_training.signals import GracefulExit


def report_end(
    args: argparse.Namespace, console: TextIO, graceful: GracefulExit, iteration: int
) -> None:
    """Say on rank 0 where everything lies, how to continue, and export if that is asked for."""
    if args.rank != 0 or args.eval_only:
        return
    folder = args.output_dir
    if iteration < (args.train_iters or 0):
        reason = (
            f"{signal.Signals(graceful.received).name} received" if graceful.received else "told to"
        )
        print(
            f"stopped after step {iteration} of {args.train_iters} ({reason}); checkpoint in {args.save}\n"
            f"to continue, give the same command again",
            file=console,
        )
        return
    print(f"done: {iteration} steps; metrics, loss.png and checkpoints in {folder}", file=console)
    if args.save_hf:
        export_in_new_process(folder, console)


def export_in_new_process(folder: str, console: TextIO) -> None:
    """Run `scripts/export_hf.py` on the run: a whole model in a process without this one's groups.

    Raises:
        SetupError: the export failed; its own message has been shown.
    """
    # Without the launcher's variables: the new process is on its own.
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    script = Path(__file__).resolve().parent.parent / "scripts" / "export_hf.py"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(script.parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [sys.executable, str(script), "--output-dir", folder],
        env=environment,
        stdout=console,
        stderr=console,
        check=False,
    )
    if result.returncode:
        raise SetupError(
            "--save-hf: the export failed; the checkpoint is complete, export it again"
        )
