"""The same training on one process, TP=2, PP=2 and DP=2: losses side by side, and a picture.

python benchmarks/layouts.py --data train.jsonl --tokenizer DIR --out runs/layouts --iterations 100

fp32 on the CPU, one thread a process. Prints the largest relative difference of loss and gradient norm
from the one-process run over the first ten iterations and over all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from random_model import make_qwen3

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "1 process": (1, []),
    "TP=2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP=2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP=2": (2, []),
}


def train(name: str, options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Run one layout and return the metrics of its steps."""
    processes, flags = LAYOUTS[name]
    folder = options.out / name.replace(" ", "_").replace("=", "")
    command = [
        *(sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", str(processes)),
        *(str(ROOT / "finetune.py"), "--hf-model", str(model), "--output-dir", str(folder)),
        *("--finetune-data-files", str(options.data), "--seq-length", str(options.seq_length)),
        *("--global-batch-size", "8", "--lr", "1e-3", "--lr-warmup-iters", "5", "--min-lr", "1e-4"),
        *("--train-iters", str(options.iterations), "--no-save-optim", *flags),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lm_loss" in record]


def difference(runs: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float:
    """Largest relative difference of one metric."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(runs, base, strict=True))


def plot(curves: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw the losses over each other, and their differences from the first below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    base = next(iter(curves.values()))
    for number, ((name, steps), width) in enumerate(
        zip(curves.items(), (6, 4, 2.5, 1), strict=True)
    ):
        iterations = [step["iteration"] for step in steps]
        upper.plot(
            iterations,
            [s["lm_loss"] for s in steps],
            linewidth=width,
            color=f"C{number}",
            alpha=0.7,
            label=name,
        )
        gaps = [
            abs(a["lm_loss"] / b["lm_loss"] - 1) + 1e-12 for a, b in zip(steps, base, strict=True)
        ]
        if steps is not base:
            lower.semilogy(iterations, gaps, linewidth=1, color=f"C{number}", label=name)
    upper.set_ylabel("loss per trained token")
    lower.set_ylabel("relative difference")
    lower.set_xlabel("iteration")
    lower.axhline(1e-5, color="gray", linestyle=":")
    upper.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    model = options.out / "model"
    make_qwen3(model, options.tokenizer, hidden=options.hidden, layers=options.layers)
    curves = {name: train(name, options, model) for name in LAYOUTS}
    base = curves["1 process"]
    print(
        f"{'layout':<12}{'first loss':>11}{'last loss':>11}"
        f"{'loss, 10':>12}{'loss, all':>12}{'norm, 10':>12}"
    )
    for name, steps in curves.items():
        print(
            f"{name:<12}{steps[0]['lm_loss']:>11.4f}{steps[-1]['lm_loss']:>11.4f}"
            f"{difference(steps[:10], base[:10], 'lm_loss'):>12.1e}"
            f"{difference(steps, base, 'lm_loss'):>12.1e}"
            f"{difference(steps[:10], base[:10], 'grad_norm'):>12.1e}"
        )
    plot(curves, options.out / "layouts.png")
    print(f"picture: {options.out / 'layouts.png'}")


if __name__ == "__main__":
    main()
