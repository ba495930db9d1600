"""Acceptance length of drafts trained right, and with one fault of other trainers each.

    python benchmarks/draft_acceptance.py --folder runs/distill --base runs/distill/base [--seeds 3]

FOLDER is a finished `scripts/distill_quickstart.sh` with its features; each draft is trained from these by
flags of the quickstart, exported, and measured by speculative decoding on 80 held-out questions, with 4
drafted tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Put in front of `finetune.py`: what is wrong in other trainers.
FAULTS = {
    "teacher overwritten in place (softmax of softmax)": """
from post_training.distillation.draft_forward import DraftForward
right = DraftForward._teacher_logits
def wrong(self, *arguments):
    logits, greedy = right(self, *arguments)
    return logits.softmax(-1), greedy
DraftForward._teacher_logits = wrong
""",
    "later steps at the same rotary position": """
from post_training.distillation.draft_forward import DraftForward
right = DraftForward._angles
DraftForward._angles = lambda self, model, packed, step: right(self, model, packed, 0)
""",
    "token not shifted": """
import torch
roll = torch.Tensor.roll
torch.Tensor.roll = lambda x, shifts, dims=None: roll(x, shifts + 1 if dims == 1 else shifts, dims)
""",
}
FLAGS = {
    "before training": "--train-iters 1 --lr 0 --min-lr 0 --lr-warmup-iters 0".split(),
    "detached steps": ["--draft-detach-steps"],
    "one test-time step": ["--draft-ttt-steps", "1"],
}


def trained(options: argparse.Namespace, seed: int, flags: list[str], fault: str = "") -> float:
    """Acceptance length of one draft."""
    hf = f"{options.base}/run/hf"
    with tempfile.TemporaryDirectory() as folder:
        start = f"{fault}\nimport runpy, sys\nsys.argv[0] = 'finetune.py'\n"
        start += "runpy.run_path('finetune.py', run_name='__main__')"
        words = [
            "--export-offline-model",
            "--offline-distillation-data",
            f"{options.folder}/features",
        ]
        words += [
            "--hf-model",
            hf,
            "--config",
            "scripts/quickstart/draft.yaml",
            "--seed",
            str(seed),
        ]
        words += ["--output-dir", folder, "--no-isolation-check", *flags]
        commands = [
            ["-c", start, *words],
            ["scripts/export_hf.py", "--output-dir", folder],
            [
                *("scripts/evaluate_draft.py", "--hf-model", hf, "--draft", f"{folder}/draft"),
                *("--data", f"{options.folder}/held_out.jsonl", "--max-new-tokens", "48"),
                *("--json", f"{folder}/found.json"),
            ],
        ]
        for command in commands:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        found: float = json.loads(Path(folder, "found.json").read_text())["acceptance_length"]
        return found


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", required=True, type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--base", required=True, type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(1, options.seeds + 1):
        print(f"as it is, seed {seed}: {trained(options, seed, []):.3f}", flush=True)
    for name, flags in FLAGS.items():
        print(f"{name}: {trained(options, 1, flags):.3f}", flush=True)
    for name, fault in FAULTS.items():
        print(f"{name}: {trained(options, 1, [], fault):.3f}", flush=True)


if __name__ == "__main__":
    main()
