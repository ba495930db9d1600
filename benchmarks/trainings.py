"""Trainings that benchmarks compare: finetune.py on the CPU, in several layouts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Processes and flags of each.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "DP=2": (2, []),
    "TP=2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP=2": (2, ["--pipeline-model-parallel-size", "2"]),
    "CP=2": (2, ["--context-parallel-size", "2"]),
}


def options_parser(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser of the data, the tokenizer and `numbers`, which have these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser


def run(world: int, script: str, arguments: Sequence[str], threads: int = 1) -> str:
    """Run a script of this project on `world` processes without a GPU; returns what it printed.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    launcher = [str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", str(world)]
    command = [sys.executable, *(launcher if world > 1 else []), str(ROOT / script), *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def train(
    layout: str, flags: Sequence[str], folder: Path, threads: int = 1
) -> list[dict[str, Any]]:
    """Run finetune.py in one of `LAYOUTS`, with `folder` as its output; the records of its steps."""
    world, own = LAYOUTS[layout]
    run(world, "finetune.py", [*flags, *own, "--output-dir", str(folder)], threads)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "lm_loss" in record]
