"""How fast do 1B- and 8B-shaped models train? The second part of check.py."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from post_training.layout.planner import Machines, plan_of
from post_training.machine.kernels import has_transformer_engine
from scripts.gpu.models import SIZES, SPEED_SEQ_LENGTH, Row, long_rows
from scripts.gpu.runs import CheckError, Run, run_flags
from scripts.plan import resolve
from scripts.quickstart.rows import write_jsonl


@dataclass(frozen=True)
class Attempt:
    """One way to fit a model into memory."""

    micro_batch: int
    recompute: bool = False
    bf16_gradients: bool = False

    def flags(self) -> list[str]:
        """Megatron's flags for it."""
        flags = ["--micro-batch-size", str(self.micro_batch)]
        if self.recompute:
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            flags += ["--recompute-num-layers", "1"]
        if self.bf16_gradients:
            flags.append("--grad-reduce-in-bf16")
        return flags

    def __str__(self) -> str:
        """Says it in a table."""
        extras = ["recompute"] * self.recompute + ["bf16 gradients"] * self.bf16_gradients
        return ", ".join([f"micro batch {self.micro_batch}", *extras])


ATTEMPTS = (
    Attempt(4),
    Attempt(2),
    Attempt(1),
    Attempt(1, recompute=True),
    Attempt(1, recompute=True, bf16_gradients=True),
)


@dataclass
class Speed:
    """What one size reached."""

    size: str
    parameters: int
    attempt: str
    tokens_per_s: float
    mfu: float | None
    """None where the device's peak is not known."""
    peak_memory_gib: float


def measure_size(
    name: str, options: argparse.Namespace, folder: Path, data: Path, tokenizer: Any
) -> Speed | None:
    """Train one size with the first attempt that fits, or say why none does.

    Raises:
        CheckError: a run failed for another reason than memory, or its loss is not a number.
    """
    size = SIZES[name]
    model = folder / "models" / name
    size.config().save_pretrained(model)
    tokenizer.save_pretrained(model)
    memory = math.inf
    if options.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    machines, least = Machines(options.gpus, memory, None), math.inf
    for number, attempt in enumerate(ATTEMPTS):
        flags = [*run_flags(model, data, folder), "--random-weights", *attempt.flags()]
        flags += ["--seq-length", str(SPEED_SEQ_LENGTH), "--log-memory-interval", "1"]
        batch = options.gpus * options.micro_batches * attempt.micro_batch
        needed = plan_of(resolve(flags.copy(), machines, has_transformer_engine()), machines).needed
        least = min(least, needed)
        if needed > memory:
            continue  # spares a start that is bound to fail
        # Never reached: the run is ended after the steps that are measured.
        flags += ["--global-batch-size", str(batch), "--train-iters", str(10 * options.steps)]
        run = Run(folder / "runs" / f"{name}-{number}", flags, options.device, options.gpus)
        try:
            steps = run.first_steps(options.steps, options.timeout)
        except CheckError:
            if "out of memory" not in run.output():
                raise
            print(f"{name}: {attempt} does not fit", flush=True)
            continue
        if not all(step["lm_loss"] is not None for step in steps):
            raise CheckError(f"{name}: the loss is not a number")
        # The first steps load kernels and make the optimizer's state.
        warm = steps[min(3, options.steps - 1) :]
        mfu = [step["mfu"] for step in warm if step.get("mfu") is not None]
        return Speed(
            name,
            size.parameters,
            str(attempt),
            statistics.median(step["tokens_per_s"] for step in warm),
            statistics.median(mfu) if mfu else None,
            run.peak_memory(),
        )
    print(
        f"{name}: skipped, it does not fit into {memory / 2**30:.0f} GiB a device; about "
        f"{least / 2**30:.0f} GiB are needed with {options.gpus} (more: --gpus N)",
        flush=True,
    )
    return None


def measure_speeds(
    options: argparse.Namespace, folder: Path, rows: Sequence[Row], tokenizer: Any
) -> tuple[list[Speed], int]:
    """Measure every size.

    Returns:
        What the sizes that fit reached, and how many runs failed.
    """
    data = folder / "long.jsonl"
    write_jsonl(data, list(long_rows(rows, 1000)))
    found, failures = [], 0
    for name in options.sizes:
        try:
            speed = measure_size(name, options, folder, data, tokenizer)
        except CheckError as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failures += 1
            continue
        if speed is not None:
            found.append(speed)
            mfu = "unknown" if speed.mfu is None else f"{speed.mfu:.1%}"
            print(
                f"{name}: {speed.parameters / 1e9:.2f} billion parameters, {speed.attempt}: "
                f"{speed.tokens_per_s:,.0f} tokens/s, MFU {mfu}, "
                f"peak memory {speed.peak_memory_gib:.1f} GiB",
                flush=True,
            )
    return found, failures
