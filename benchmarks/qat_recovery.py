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
    quickstart, folder = options.quickstart.resolve(), options.folder.resolve()
    base, task = quickstart / "run/hf", quickstart / "task"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "two_bits.yaml").write_text(FORMAT)

    def run(log: Path, *words: str | Path) -> None:
        with log.open("w") as file:
            command = [sys.executable, *words]
            if subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode:
                raise SystemExit(f"{words[0]} failed; {log} says why")

    def measure(name: str, *model: str | Path, loss: str) -> float:
        scores, losses = folder / f"{name}.json", folder / name / "quantisation.json"
        questions = ("--data", task / "test.jsonl", "--max-new-tokens", "48", "--json", scores)
        run(folder / f"{name}.eval.log", "scripts/evaluate.py", *model, *questions)
        accuracy = float(json.loads(scores.read_text())["accuracy"])
        told = f"   loss {json.loads(losses.read_text())[loss]:.4f}" if losses.is_file() else ""
        print(f"{name:10} {accuracy:6.1%}{told}", flush=True)
        return accuracy

    def trained(name: str, seed: int, flags: list[str], loss: str) -> float:
        run(
            folder / f"{name}.log",
            *("finetune.py", "--hf-model", base, "--finetune-data-files", task / "train.jsonl"),
            *("--config", "scripts/quickstart/train.yaml", "--seed", str(seed), *flags, *more),
            *("--export-quant-cfg", folder / "two_bits.yaml", "--output-dir", folder / name),
        )
        return measure(name, "--output-dir", folder / name, loss=loss)

    whole = measure("whole", "--hf-model", base, loss="before")
    rounded = trained("rounded", options.seeds[0], ROUNDED, "quantised")
    found = [trained(f"seed-{seed}", seed, TRAINED, "trained") for seed in options.seeds]
    regained = [(accuracy - rounded) / max(whole - rounded, 1e-9) for accuracy in found]
    print("regained", *(f"{share:.0%}" for share in regained))
    return 0 if whole - rounded >= 0.05 and min(regained) >= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
