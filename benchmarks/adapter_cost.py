r"""LoRA against full finetuning: CPU time of a step, peak memory, bytes of a checkpoint, as ratios.

python benchmarks/adapter_cost.py --data train.jsonl --tokenizer DIR [--hidden 512 --layers 8] [--rank 16] \
    [--model-backend transformers]

Beside Megatron's layers, or in a model of transformers, where QLoRA is measured too. One process on the
CPU, in turns, without the first three steps; the peak is that of the process's resident memory. A model of
a billion parameters is counted from its shapes alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from random_model import make_qwen3
from trainings import ROOT, options_parser
from transformers import AutoModelForCausalLM, LlamaConfig

from post_training.adapters.settings import LoraSettings, chosen_targets, trained_parameters
from post_training.metrics.records import records_of

WARM_UP = 3
BILLION = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


def train(flags: list[str], folder: Path) -> tuple[float, float]:
    """A run's CPU seconds for each step behind the first ones, and the peak of its memory in GiB."""
    command = [sys.executable, str(ROOT / "finetune.py"), *flags, "--output-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    spent: dict[int, float] = {}
    with subprocess.Popen(command, env=environment | {"PYTHONPATH": str(ROOT)}) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            done = [record for record in records_of(folder) if "lm_loss" in record]
            if len(done) not in spent:
                times = psutil.Process(process.pid).cpu_times()
                spent[len(done)] = times.user + times.system
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    first, last = min(step for step in spent if step >= WARM_UP), max(spent)
    return (spent[last] - spent[first]) / (last - first), ended[2].ru_maxrss / 2**20


def checkpoint_size(folder: Path) -> int:
    """Bytes of the newest checkpoint of a run."""
    newest = max((folder / "checkpoints").glob("iter_*[0-9]"))
    return sum(file.stat().st_size for file in newest.rglob("*"))


def count_billion(rank: int) -> None:
    """Print what a checkpoint of an adapter of a 1B shape takes, against one of the whole model in bf16."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(BILLION).num_parameters()
    targets = chosen_targets(BILLION, LoraSettings(rank, 2.0 * rank, ("all",)))
    trained = trained_parameters(targets.values())
    print(
        f"{whole:,} parameters, rank {rank}: {trained:,} trained; a checkpoint takes "
        f"{16 * trained / 2**20:.0f} MiB, {16 * trained / (14 * whole):.2%} of the whole model's"
    )


def main() -> None:
    """Entry point."""
    parser = options_parser(
        __doc__, hidden=1024, layers=8, seq_length=512, iterations=8, rank=16, turns=2
    )
    parser.add_argument("--model-backend", choices=["megatron", "transformers"], default="megatron")
    options = parser.parse_args()
    count_billion(options.rank)
    lora = ["--lora-rank", str(options.rank)]
    kinds = {"full": [], "LoRA": lora}
    if options.model_backend == "transformers":
        kinds["QLoRA"] = [*lora, "--base-precision", "nf4"]
    found: dict[str, tuple[list[float], list[float], int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_qwen3(model, options.tokenizer, hidden=options.hidden, layers=options.layers)
        flags = [
            *("--hf-model", str(model), "--finetune-data-files", str(options.data)),
            *("--seq-length", str(options.seq_length), "--train-iters", str(options.iterations)),
            *("--global-batch-size", "2", "--lr", "1e-4", "--no-progress"),
            *("--model-backend", options.model_backend),
        ]
        for turn in range(options.turns):
            for name, more in kinds.items():
                folder = Path(scratch) / f"{name}-{turn}"
                seconds, resident = train([*flags, *more], folder)
                entry = found.setdefault(name, ([], [], checkpoint_size(folder)))
                entry[0].append(seconds)
                entry[1].append(resident)
    print(f"{'':8}{'CPU s/step':>12}{'peak GiB':>10}{'checkpoint MiB':>16}")
    rows = {
        name: (statistics.median(seconds), statistics.median(peaks), size / 2**20)
        for name, (seconds, peaks, size) in found.items()
    }
    for name, row in rows.items():
        print(f"{name:8}{row[0]:12.3f}{row[1]:10.2f}{row[2]:16.1f}")
        ratios = [own / full for own, full in zip(row, rows["full"], strict=True)]
        print(f"{'ratio':8}{ratios[0]:12.2f}{ratios[1]:10.2f}{ratios[2]:16.4f}")


if __name__ == "__main__":
    main()
