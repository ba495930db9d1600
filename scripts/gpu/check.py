"""Compares a GPU's losses with the CPU's, and measures 1B- and 8B-shaped models on it.

    python scripts/gpu/check.py                                   both parts; needs CUDA
    python scripts/gpu/check.py --sizes                           losses only
    python scripts/gpu/check.py --families --sizes 8b --gpus 8    speed of one size only
    python scripts/gpu/check.py --device cpu                      tests this script without a GPU

Attention: the kernel in bf16, on packed documents and on the pieces of context parallelism, against fp32
on the CPU. Losses: a tiny model of each family is finetuned for some steps by finetune.py on the CPU in
fp32, then on the GPU in fp32 and in bf16, from the same weights and rows. Speed: models of random weights
train on packs of 4096 tokens; the micro batch is the largest that fits. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from scripts.gpu.attention import compare_attention
from scripts.gpu.losses import Comparison, compare_losses
from scripts.gpu.models import FAMILIES, SIZES
from scripts.gpu.speed import measure_speeds
from scripts.quickstart.base_model import make_tokenizer
from scripts.quickstart.rows import make_rows

NO_CUDA = 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; on the CPU the defaults are what a self-test of this script needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests this script")
    add("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES),
        help="whose losses are compared; none: no comparison")  # fmt: skip
    add("--sizes", nargs="*", choices=list(SIZES), default=None,
        help="whose speed is measured (default: 1b 8b); none: no measurement")  # fmt: skip
    add("--steps", type=int, default=10, help="steps of each run")
    add("--gpus", type=int, default=1, help="data parallel processes of the speed runs")
    add(
        "--micro-batches",
        type=int,
        default=None,
        help="of a step of the speed runs, for each GPU (default: 8)",
    )
    add("--timeout", type=float, default=1800.0, help="seconds a run may take")
    add("--json", type=Path, help="write the results to a file")
    options = parser.parse_args(argv)
    if options.sizes is None:
        options.sizes = ["1b", "8b"] if options.device == "cuda" else ["tiny"]
    if options.micro_batches is None:
        options.micro_batches = 8 if options.device == "cuda" else 1
    if options.steps < 1 or options.gpus < 1 or options.micro_batches < 1:
        parser.error("--steps, --gpus and --micro-batches must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(argv)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device here: nothing to check (--device cpu tests the check itself)")
            return NO_CUDA
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        print(
            f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, torch {torch.__version__}"
        )
        if options.gpus > torch.cuda.device_count():
            print(f"error: --gpus {options.gpus}: this machine has {torch.cuda.device_count()}")
            return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        rows, _ = make_rows(0)
        tokenizer = make_tokenizer(rows)
        comparisons: list[Comparison] = []
        failures = 0
        if options.families:
            worst, wrong = compare_attention(options.device)
            print(f"attention in bf16, whole documents and pieces: within {worst:.0e} of CPU fp32")
            comparisons, failures = compare_losses(options, folder, rows, tokenizer)
            failures += wrong
        speeds, failed = (
            measure_speeds(options, folder, rows, tokenizer) if options.sizes else ([], 0)
        )
    failures += failed + sum(not comparison.good for comparison in comparisons)
    if options.json:
        result = {
            "losses": [asdict(comparison) for comparison in comparisons],
            "speeds": [asdict(speed) for speed in speeds],
            "failures": failures,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("all good" if not failures else f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
