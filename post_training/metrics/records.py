"""Reads back what runs write line by line, whatever a killed run or an editor has left in it."""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# A line for each start of a run: restarts, versions and layouts, which `metrics.jsonl` does not tell.
STARTS = "starts.jsonl"
# What the run said of its data.
DATA_REPORT = "data.txt"
# Losses before and after quantisation and after training.
QUANTISATION = "quantisation.json"
# A file SPLIT-STEP.json for each evaluation with `--answer-tokens`.
ANSWERS = "answers"
# Fields of a step's record, or by which records are told apart, that nothing else may be called.
OWN_FIELDS = frozenset(
    """
    iteration split sources skipped consumed_samples lm_loss grad_norm lr trained_tokens
    total_trained_tokens tokens_per_s real_tokens_per_s data_wait_fraction step_seconds save_seconds mfu
    """.split()
)
PACKAGES = ("megatron-sft", "torch", "megatron-core", "transformers", "transformer-engine", "peft")


def _number(text: str) -> float | None:
    """A number that can be drawn; whole ones stay whole."""
    value = float(text)
    if not abs(value) < 1e300:
        return None
    return int(text) if text.lstrip("-").isdecimal() else value


def read_records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a run's `metrics.jsonl` and what each says; those that are no record are left out.

    Infinities and NaN, which JSON does not have, become None.
    """
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(
                line, parse_int=_number, parse_float=_number, parse_constant=_number
            )
        except (ValueError, RecursionError):
            continue  # cut off when the run was killed
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            found.append((line, record))
    return found


def records_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a file of an output folder; none where there is no file."""
    file = folder / name
    return [record for _, record in read_records(file)] if file.is_file() else []


def installed_versions() -> dict[str, str]:
    """Of the packages that make up a result."""
    found = {"python": sys.version.partition(" ")[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_start(args: argparse.Namespace, iteration: int) -> None:
    """Note that a run begins, or goes on, after `iteration`."""
    record = {
        "iteration": iteration,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "processes": args.world_size,
        **{
            name: getattr(args, f"{name}_model_parallel_size")
            for name in ("tensor", "pipeline", "expert")
        },
        "context": args.context_parallel_size,
        "command": shlex.join(sys.argv),
        "versions": installed_versions(),
    }
    with (Path(args.output_dir) / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
