"""One process of finetune.py against a plain PyTorch loop over the HuggingFace model on the same packs.

python benchmarks/train_step.py --data train.jsonl --tokenizer DIR [--hidden 512 --layers 8]

Both run twice, alternating, with the same number of threads, in fp32 on the CPU; medians of the steps
after the first three are compared, and the losses. The plain loop is what a careful user writes: packs
with reset positions (transformers isolates documents by them), cross-entropy of every token with a label
mask, AdamW, exact clipping.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_model import make_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import SFTDataset, prepare_documents

ROOT = Path(__file__).resolve().parent.parent
LR, WARM_UP = 1e-4, 3


def megatron(options: argparse.Namespace, model: Path, folder: Path) -> list[dict[str, Any]]:
    """Steps of finetune.py: `lm_loss` and `step_seconds`."""
    command = [
        *(sys.executable, str(ROOT / "finetune.py"), "--hf-model", str(model)),
        *("--output-dir", str(folder), "--finetune-data-files", str(options.data), "--fp32"),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.batch)),
        *("--micro-batch-size", str(options.micro), "--train-iters", str(options.iterations)),
        *("--lr", str(LR), "--lr-decay-style", "constant", "--no-save-optim"),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lm_loss" in record]


def plain_loop(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The same steps with nothing but torch and transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = prepare_documents(
        files=[str(options.data)],
        tokenizer=tokenizer,
        seq_length=options.seq_length,
        cache_dir=None,
    )
    packs = SFTDataset(
        options.batch * options.iterations,
        documents,
        tokenizer,
        options.seq_length,
        global_batch_size=options.batch,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    steps = []
    for step in range(options.iterations):
        begin = time.perf_counter()
        optimizer.zero_grad()
        batch = [packs[step * options.batch + i] for i in range(options.batch)]
        rows = {name: torch.stack([pack[name] for pack in batch]) for name in batch[0]}
        labels = rows["input_ids"].roll(-1, 1)
        same = rows["position_ids"].roll(-1, 1) != 0
        labels[~((rows["loss_mask"].roll(-1, 1) == 1) & same)] = -100
        count = (labels != -100).sum()
        total = 0.0
        for first in range(0, options.batch, options.micro):
            part = slice(first, first + options.micro)
            logits = model(
                input_ids=rows["input_ids"][part],
                position_ids=rows["position_ids"][part],
                use_cache=False,
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[part].flatten(), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.append({"lm_loss": total / int(count), "step_seconds": time.perf_counter() - begin})
    return steps


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
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[float]] = {"finetune.py": [], "plain loop": []}
    gap = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_qwen3(model, options.tokenizer, hidden=options.hidden, layers=options.layers)
        for turn in range(2):
            ours = megatron(options, model, Path(scratch) / f"run{turn}")
            plain = plain_loop(options, model)
            seconds["finetune.py"] += [step["step_seconds"] for step in ours[WARM_UP:]]
            seconds["plain loop"] += [step["step_seconds"] for step in plain[WARM_UP:]]
            gap = max(
                gap,
                *(abs(a["lm_loss"] / b["lm_loss"] - 1) for a, b in zip(ours, plain, strict=True)),
            )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = options.batch * options.seq_length
    for name, median in medians.items():
        print(f"{name:<12} {median:8.3f} s a step {tokens / median:10.0f} tokens/s")
    ratio = medians["plain loop"] / medians["finetune.py"]
    print(f"finetune.py runs at {ratio:.2f} times the plain loop; losses within {gap:.1e}")


if __name__ == "__main__":
    main()
