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
import statistics
import tempfile
from pathlib import Path

from random_model import make_qwen3
from trainings import LAYOUTS, options_parser, run, train

LR, WARM_UP = 1e-4, 3
Steps = list[dict[str, float]]
OURS = {f"finetune.py {name}".removesuffix(" 1 process"): name for name in LAYOUTS}
PEERS: dict[str, tuple[int, str]] = {"plain loop": (1, "plain"), "plain loop DDP=2": (2, "plain")}
TRL: dict[str, tuple[int, str]] = {
    "TRL, padded": (1, "trl-padded"),
    "TRL, packed": (1, "trl-packed"),
}


def flags_of(options: argparse.Namespace, model: Path) -> list[str]:
    """Flags of finetune.py."""
    return [
        *("--hf-model", str(model), "--finetune-data-files", str(options.data), "--fp32"),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.batch)),
        *("--micro-batch-size", str(options.micro), "--train-iters", str(options.iterations)),
        *("--lr", str(LR), "--lr-decay-style", "constant", "--no-save-optim"),
        *("--model-backend", options.model_backend),
    ]


def ours(name: str, options: argparse.Namespace, model: Path, folder: Path) -> Steps:
    """Steps of finetune.py."""
    records = train(OURS[name], flags_of(options, model), folder, options.threads)
    return [
        {
            "lm_loss": record["lm_loss"],
            "seconds": record["step_seconds"],
            "real_tokens": record["real_tokens_per_s"] * record["step_seconds"],
            "trained_tokens": record["trained_tokens"],
        }
        for record in records
        if record["step_seconds"]
    ]


def peer(what: tuple[int, str], settings: Path, threads: int) -> Steps:
    """Steps of a loop of `train_step_peers.py`."""
    world, words = what
    printed = run(world, "benchmarks/train_step_peers.py", [words, str(settings)], threads)
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
    parser = options_parser(
        __doc__, hidden=512, layers=8, seq_length=512, batch=8, micro=2, iterations=10, threads=1
    )
    parser.add_argument("--turns", type=int, default=2, help="how often each runs")
    parser.add_argument(
        "--model-backend",
        choices=["megatron", "transformers"],
        default="megatron",
        help="what computes the model in finetune.py",
    )
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
            flags = [*flags_of(options, model), "--output-dir", str(Path(scratch) / "profile")]
            printed = run(1, "benchmarks/step_profile.py", flags, options.threads)
            print(printed[printed.index("operation ") :])


if __name__ == "__main__":
    main()
