"""`--save-hf`: the checkpoint of the last step, exported by a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import post_training
from post_training.checkpoints import checkpoint_path
from post_training.errors import SetupError


def export_in_new_process(args: argparse.Namespace, iteration: int, console: TextIO) -> None:
    """Write `hf/` of the run: a whole model on the CPU, without this process's groups and memory.

    Args:
        args: arguments of the run.
        iteration: of the checkpoint to export; it need not be the newest, nor lie in the run's folder.
        console: where the child process speaks.

    Raises:
        SetupError: the export failed; its own message has been shown.
    """
    # Without the launcher's variables: the new process is on its own.
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    root = Path(str(post_training.__file__)).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), *filter(None, [environment.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [
            *(sys.executable, str(root / "scripts" / "export_hf.py")),
            *("--output-dir", args.output_dir, "--to", os.path.join(args.output_dir, "hf")),
            *("--checkpoint", str(checkpoint_path(args.save, iteration))),
        ],
        env=environment,
        stdout=console,
        stderr=console,
        check=False,
    )
    if result.returncode:
        raise SetupError(
            "--save-hf: the export failed; the checkpoint is complete, export it again"
        )
