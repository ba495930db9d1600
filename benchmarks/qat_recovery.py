"""What rounding weights to two bits costs a finetuned model, and what training gives back.

    bash scripts/quickstart.sh runs/quickstart
    python benchmarks/qat_recovery.py runs/quickstart runs/recovery [--seeds 1 2 3] [FLAGS of finetune.py]

Exact match on the quickstart's 500 held-out questions: in full precision, rounded, and trained on
through the rounded numbers, by each seed on other data. The status is 1 if rounding costs less than
5 points, or if a seed regains less than half of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORMAT = """
quant_cfg:
  - {quantizer_name: "*", enable: false}
  - {quantizer_name: "*weight_quantizer", cfg: {num_bits: 2, block_sizes: {-1: 32, type: static}}}
  - {quantizer_name: "*output_layer*", enable: false}
algorithm: max
"""
# On weights that do not move: rounding them depends on no data and no seed.
ROUNDED = "--train-iters 1 --lr-warmup-iters 0 --lr 1e-30 --min-lr 0 --weight-decay 0".split()
TRAINED = "--train-iters 100 --lr-warmup-iters 10 --lr 1e-3".split()


def main() -> int:
    """Print a line for each model; returns the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options, more = parser.parse_known_args()
    task, folder = options.quickstart.resolve() / "task", options.folder.resolve()
    base = options.quickstart.resolve() / "run/hf"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "two_bits.yaml").write_text(FORMAT)

    def run(log: str, script: str, *words: str | Path) -> None:
        with (folder / log).open("w") as file:
            command = [sys.executable, ROOT / script, *words]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}; {folder / log} says why")

    def matches(name: str, *model: str | Path) -> float:
        scores = folder / f"{name}.json"
        questions = ("--data", task / "test.jsonl", "--max-new-tokens", "48", "--json", scores)
        run(f"{name}.eval.log", "scripts/evaluate.py", *model, *questions)
        return float(json.loads(scores.read_text())["accuracy"])

    def trained(name: str, seed: int, flags: list[str]) -> tuple[float, dict[str, Any]]:
        run(
            f"{name}.log",
            "finetune.py",
            *("--hf-model", base, "--finetune-data-files", task / "train.jsonl"),
            *("--config", ROOT / "scripts/quickstart/train.yaml", "--seed", str(seed)),
            *("--export-quant-cfg", folder / "two_bits.yaml", "--no-save-optim"),
            *("--output-dir", folder / name, *flags, *more),
        )
        return (
            matches(name, "--output-dir", folder / name),
            json.loads((folder / name / "quantisation.json").read_text()),
        )

    whole = matches("full", "--hf-model", base)
    rounded, losses = trained("rounded", options.seeds[0], ROUNDED)
    print(f"full precision   {whole:6.1%}   loss {losses['before']:.4f}")
    print(f"rounded          {rounded:6.1%}   loss {losses['quantised']:.4f}", flush=True)
    good = whole - rounded >= 0.05
    for seed in options.seeds:
        found, losses = trained(f"seed-{seed}", seed, TRAINED)
        regained = (found - rounded) / max(whole - rounded, 1e-9)
        good = good and regained >= 0.5
        told = f"{found:6.1%}   loss {losses['trained']:.4f}   regained {regained:.0%}"
        print(f"trained, seed {seed:<2} {told}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
