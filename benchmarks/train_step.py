"""A training step of finetune.py against a plain PyTorch loop and TRL, and its own parallel layouts.

python benchmarks/train_step.py --data train.jsonl --tokenizer DIR [--hidden 512 --layers 8] [--trl]

All train the same random Qwen3-shaped model in fp32 on the CPU, one thread a process, in turns; medians
of the steps after the first three are compared, as ratios. finetune.py and the plain loop read the same
packs, so their losses are compared too. A real token is one of a document, not padding; a trained token
is one with a label. `--trl` adds TRL's SFTTrainer (extra `bench`) on question/answer rows, padded and
with its own packing, without gradient checkpointing. `--profile` prints where a step of finetune.py
spends its time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_model import make_qwen3

ROOT = Path(__file__).resolve().parent.parent
LR, WARM_UP = 1e-4, 3
Steps = list[dict[str, float]]
OURS: dict[str, tuple[int, list[str]]] = {
    "finetune.py": (1, []),
    "finetune.py DP=2": (2, []),
    "finetune.py TP=2": (2, ["--tensor-model-parallel-size", "2"]),
    "finetune.py PP=2": (2, ["--pipeline-model-parallel-size", "2"]),
    "finetune.py CP=2": (2, ["--context-parallel-size", "2"]),
}
PEERS: dict[str, tuple[int, str]] = {"plain loop": (1, "plain"), "plain loop DDP=2": (2, "plain")}
TRL: dict[str, tuple[int, str]] = {
    "TRL, padded": (1, "trl-padded"),
    "TRL, packed": (1, "trl-packed"),
}


def run(command: list[str], threads: int) -> str:
    """Run a command without a GPU and return what it printed."""
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


def launched(world: int, script: Path) -> list[str]:
    """The words that start `script` on `world` processes."""
    if world == 1:
        return [sys.executable, str(script)]
    launcher = str(ROOT / "scripts" / "launch.py")
    return [sys.executable, launcher, "--nproc-per-node", str(world), str(script)]


def flags_of(options: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    """Flags of finetune.py."""
    return [
        *("--hf-model", str(model)),
        *("--output-dir", str(folder), "--finetune-data-files", str(options.data), "--fp32"),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.batch)),
        *("--micro-batch-size", str(options.micro), "--train-iters", str(options.iterations)),
        *("--lr", str(LR), "--lr-decay-style", "constant", "--no-save-optim"),
    ]


def ours(name: str, options: argparse.Namespace, model: Path, folder: Path) -> Steps:
    """Steps of finetune.py."""
    world, flags = OURS[name]
    command = launched(world, ROOT / "finetune.py")
    run([*command, *flags_of(options, model, folder), *flags], options.threads)
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {
            "lm_loss": record["lm_loss"],
            "seconds": record["step_seconds"],
            "real_tokens": record["real_tokens_per_s"] * record["step_seconds"],
            "trained_tokens": record["trained_tokens"],
        }
        for record in records
        if record.get("step_seconds")
    ]


def peer(what: tuple[int, str], settings: Path, threads: int) -> Steps:
    """Steps of a loop of `train_step_peers.py`."""
    world, words = what
    script = ROOT / "benchmarks" / "train_step_peers.py"
    printed = run([*launched(world, script), words, str(settings)], threads)
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]


def report(found: dict[str, Steps]) -> None:
    """Print medians, and ratios to the plain loop on one process."""
    speeds = {}
    for name, steps in found.items():
        real = statistics.median(step["real_tokens"] / step["seconds"] for step in steps)
        trained = statistics.median(step["trained_tokens"] / step["seconds"] for step in steps)
        seconds = statistics.median(step["seconds"] for step in steps)
        speeds[name] = real, trained, seconds
    base = speeds["plain loop"]
    print(f"{'':18} {'s/step':>7} {'real tokens/s':>14} {'trained/s':>10} {'of plain loop':>14}")
    for name, (real, trained, seconds) in speeds.items():
        print(f"{name:18} {seconds:7.3f} {real:14.0f} {trained:10.0f} {real / base[0]:13.2f}x")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2, help="how often each runs")
    parser.add_argument("--ranks", action="store_true", help="also two processes")
    parser.add_argument("--trl", action="store_true", help="also TRL, which must be installed")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    options = parser.parse_args()
    names = [*OURS, *PEERS] if options.ranks else ["finetune.py", "plain loop"]
    names += [*TRL] if options.trl else []
    found: dict[str, Steps] = {name: [] for name in names}
    gap = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_qwen3(model, options.tokenizer, hidden=options.hidden, layers=options.layers)
        settings = Path(scratch) / "options.json"
        values = {key: getattr(options, key) for key in ("batch", "micro", "iterations", "threads")}
        values |= {"seq_length": options.seq_length, "data": str(options.data), "lr": LR}
        values |= {"model": str(model), "cache": str(Path(scratch) / "cache")}
        losses: dict[str, list[float]] = {}
        for turn in range(options.turns):
            for name in names:
                if name in OURS:
                    steps = ours(name, options, model, Path(scratch) / f"{name}-{turn}")
                    if turn == 0 and name == "finetune.py":
                        first = steps[WARM_UP:]
                        rows = sum(step["real_tokens"] for step in first) / len(first)
                        values["rows_per_pack"] = max(1, round(rows / options.batch / 200))
                        settings.write_text(json.dumps(values))
                else:
                    steps = peer((PEERS | TRL)[name], settings, options.threads)
                found[name] += steps[WARM_UP:]
                losses[name] = [step["lm_loss"] for step in steps]
                if name not in TRL:
                    base = losses["finetune.py"]
                    pairs = zip(losses[name], base, strict=True)
                    gap = max(gap, *(abs(a / b - 1) for a, b in pairs))
        report(found)
        print(f"losses of finetune.py and the plain loop: within {gap:.1e} of each other")
        if options.profile:
            script = str(ROOT / "benchmarks" / "step_profile.py")
            flags = flags_of(options, model, Path(scratch) / "profile")
            printed = run([sys.executable, script, *flags], options.threads)
            print(printed[printed.index("operation ") :])


if __name__ == "__main__":
    main()
