"""Does the GPU compute what the CPU computes? The first part of check.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu.models import Row, make_family
from scripts.gpu.runs import CheckError, Run
from scripts.quickstart.rows import write_jsonl

# Largest relative difference of a loss that rounding explains.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass
class Comparison:
    """The losses of one run beside the CPU's."""

    family: str
    run: str
    first: float
    last: float
    difference: float
    """Largest of all steps, relative to the CPU's loss."""
    allowed: float

    @property
    def good(self) -> bool:
        """Whether every loss is near enough; NaN is not."""
        return self.difference <= self.allowed


def has_transformer_engine() -> bool:
    """Whether Megatron would use Transformer Engine on this machine's GPU."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def variants(device: str) -> dict[str, list[str]]:
    """Flags of the runs that are compared with the CPU's, by precision and attention."""
    if device == "cpu":
        return {"fp32": [], "bf16": ["--bf16"], "fp32 FSDP2": ["--use-torch-fsdp2"]}
    local = ["--transformer-impl", "local"]
    runs = {"fp32": ["--fp32", *local], "bf16": ["--bf16", *local]}
    if has_transformer_engine():
        runs["bf16 with TE"] = ["--bf16", "--transformer-impl", "transformer_engine"]
    # Sharded over the one GPU; with Transformer Engine where it is installed.
    runs["fp32 FSDP2"] = ["--fp32", *local, "--use-torch-fsdp2"]
    runs["bf16 FSDP2"] = ["--bf16", "--use-torch-fsdp2"]
    return runs


def compare_losses(
    options: argparse.Namespace, folder: Path, rows: Sequence[Row], tokenizer: Any
) -> tuple[list[Comparison], int]:
    """Train every family on the CPU and on the device.

    Returns:
        The comparisons, and how many runs failed.
    """
    data = folder / "short.jsonl"
    write_jsonl(data, rows[:400])
    found, failures = [], 0
    print(
        f"{'family':<11}{'run':<18}{'first loss':>11}{'last loss':>11}{'difference':>12}{'allowed':>9}"
    )
    for family in options.families:
        model = folder / "models" / family
        make_family(family, model, tokenizer)
        flags = ["--hf-model", str(model), "--finetune-data-files", str(data)]
        flags += [
            "--data-cache-dir",
            str(folder / "cache"),
            "--no-save-optim",
            "--data-workers",
            "0",
        ]
        flags += ["--seq-length", "256", "--micro-batch-size", "2", "--global-batch-size", "4"]
        flags += [
            "--train-iters",
            str(options.steps),
            "--lr",
            "1e-3",
            "--lr-decay-style",
            "constant",
        ]
        try:
            truth = Run(folder / "runs" / family / "truth", flags, "cpu").losses(options.timeout)
        except CheckError as error:
            print(f"{family:<11}{'CPU fp32':<18}FAILED: {error}")
            failures += 1
            continue
        print(f"{family:<11}{'CPU fp32':<18}{truth[0]:>11.5f}{truth[-1]:>11.5f}", flush=True)
        for name, extra in variants(options.device).items():
            label = f"{options.device.upper()} {name}"
            run = Run(
                folder / "runs" / family / name.replace(" ", "_"), [*flags, *extra], options.device
            )
            try:
                losses = run.losses(options.timeout)
            except CheckError as error:
                print(f"{family:<11}{label:<18}FAILED: {error}")
                failures += 1
                continue
            one = Comparison(
                family,
                label,
                losses[0],
                losses[-1],
                difference(losses, truth),
                TOLERANCES[name[:4]],
            )
            found.append(one)
            verdict = "" if one.good else "  TOO LARGE"
            print(
                f"{'':<11}{label:<18}{one.first:>11.5f}{one.last:>11.5f}{one.difference:>12.1e}"
                f"{one.allowed:>9.0e}{verdict}",
                flush=True,
            )
    return found, failures


def difference(losses: Sequence[float], truth: Sequence[float]) -> float:
    """Largest relative difference of two loss curves; NaN when one is cut short or not finite."""
    if len(losses) != len(truth) or not all(map(math.isfinite, [*losses, *truth])):
        return math.nan
    return max(abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True))
