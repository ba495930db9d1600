"""What rounding weights to two bits costs a finetuned model, and what quantisation-aware training gives back.

    bash scripts/quickstart.sh runs/quickstart
    python benchmarks/qat_recovery.py runs/quickstart runs/recovery [--seeds 1 2 3] [FLAGS of finetune.py]

Exact match on the quickstart's 500 held-out questions, in full precision, rounded, and trained on through the
rounded numbers, which each seed does on other data. The status is 1 if rounding costs less than 5 points, or
a seed regains less than half of them.
"""

from __future__ import annotations

import argparse
import json
import os
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
ROUNDED = ("--train-iters", "1", "--lr", "1e-30", "--min-lr", "0", "--weight-decay", "0")
TRAINED = ("--train-iters", "100", "--lr", "1e-3", "--lr-warmup-iters", "10")


def run(log: Path, script: str, *words: str | Path) -> None:
    """Run a script of this project, what it prints in `log`."""
    with log.open("w") as file:
        command = [sys.executable, ROOT / script, *words]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}; {log} says why")


class Recovery:
    """Trains from one quickstart, and asks its questions."""

    def __init__(self, quickstart: Path, folder: Path, more: list[str]) -> None:
        self.task, self.model = quickstart / "task", quickstart / "run/hf"
        self.folder, self.more = folder, more
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "two_bits.yaml").write_text(FORMAT)

    def trained(self, name: str, seed: int, *flags: str) -> tuple[float, dict[str, Any]]:
        """Exact match of a quantised run, and its `quantisation.json`."""
        run(
            self.folder / f"{name}.log",
            "finetune.py",
            *("--hf-model", self.model, "--finetune-data-files", self.task / "train.jsonl"),
            *("--config", ROOT / "scripts/quickstart/train.yaml", "--seed", str(seed)),
            *("--export-quant-cfg", self.folder / "two_bits.yaml", "--no-save-optim"),
            *("--output-dir", self.folder / name, *flags, *self.more),
        )
        losses: dict[str, Any] = json.loads((self.folder / name / "quantisation.json").read_text())
        return self.matches(name, "--output-dir", self.folder / name), losses

    def matches(self, name: str, *model: str | Path) -> float:
        """Share of the held-out questions that are answered right."""
        scores = self.folder / f"{name}.json"
        questions = ("--data", self.task / "test.jsonl", "--max-new-tokens", "48", "--json", scores)
        run(self.folder / f"{name}.eval.log", "scripts/evaluate.py", *model, *questions)
        return float(json.loads(scores.read_text())["accuracy"])


def main() -> int:
    """Print a line for each model; returns the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options, more = parser.parse_known_args()
    recovery = Recovery(options.quickstart.resolve(), options.folder.resolve(), more)
    whole = recovery.matches("full", "--hf-model", recovery.model)
    rounded, losses = recovery.trained("rounded", options.seeds[0], *ROUNDED)
    print(f"full precision   {whole:6.1%}   loss {losses['before']:.4f}")
    print(f"rounded          {rounded:6.1%}   loss {losses['quantised']:.4f}", flush=True)
    good = whole - rounded >= 0.05
    for seed in options.seeds:
        found, losses = recovery.trained(f"seed-{seed}", seed, *TRAINED)
        regained = (found - rounded) / max(whole - rounded, 1e-9)
        good = good and regained >= 0.5
        print(
            f"trained, seed {seed:<2} {found:6.1%}   loss {losses['trained']:.4f}   regained {regained:.0%}",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
