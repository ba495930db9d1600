"""The same training on one process, TP=2, PP=2 and DP=2: losses side by side.

python benchmarks/layouts.py --data train.jsonl --tokenizer DIR --out runs/layouts --iterations 100

fp32 on the CPU, one thread a process. Prints the largest relative difference of loss and gradient norm
from the one-process run over the first ten iterations and over all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from random_model import make_qwen3
from trainings import options_parser, train

COMPARED = ("1 process", "TP=2", "PP=2", "DP=2")


def difference(runs: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> float:
    """Largest relative difference of one metric."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(runs, base, strict=True))


def main() -> None:
    """Entry point."""
    parser = options_parser(__doc__, iterations=100, seq_length=512, hidden=128, layers=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = options.out / "model"
    make_qwen3(model, options.tokenizer, hidden=options.hidden, layers=options.layers)
    flags = [
        *("--hf-model", str(model), "--finetune-data-files", str(options.data), "--no-save-optim"),
        *("--seq-length", str(options.seq_length), "--train-iters", str(options.iterations)),
        *("--global-batch-size", "8", "--lr", "1e-3", "--lr-warmup-iters", "5", "--min-lr", "1e-4"),
    ]
    curves = {
        name: train(name, flags, options.out / name.replace(" ", "_").replace("=", ""))
        for name in COMPARED
    }
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


if __name__ == "__main__":
    main()
