"""Speed of models of `transformers`, as ratios of things measured in one run.

    python benchmarks/hf_models.py

On one process and one thread, fp32, a model of Llama's shape (4 layers, hidden 256):

- a pass forward and backward over a pack, by our own attention function, by the model's own attention with
  positions that begin anew, and as padded rows, for packs of three kinds;
- the same documents in a plain HuggingFace loop, one at a time.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from post_training import platform

platform.apply()

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import LlamaConfig

from post_training.hf.causal_lm import build_model
from post_training.hf_models.model import HFModel
from post_training.hf_models.packing import WAYS

PACKS = {
    "4 x 512": [512] * 4,
    "16 x 128": [128] * 16,
    "mixed": [300, 40, 900, 60, 200, 100, 448],
}


def timed(run: Callable[[], Tensor], rounds: int) -> float:
    """Median process seconds of a pass forward and backward."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        run().backward()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds[1:])


def packed(model: HFModel, way: str, ids: Tensor, lengths: list[int]) -> Tensor:
    """A loss of every third token of a pack."""
    chosen = torch.arange(0, len(ids), 3)
    return model.packed_logits(way, ids, lengths, chosen).logsumexp(-1).sum()


def alone(model: HFModel, ids: Tensor, lengths: list[int]) -> Tensor:
    """The same as a plain loop computes it: all logits of one document at a time."""
    model.documents.begin("stock", None)
    parts = [
        model.model(input_ids=document.unsqueeze(0), use_cache=False).logits[0, ::3]
        for document in ids.split(lengths)
    ]
    return torch.cat(parts).logsumexp(-1).sum()


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    model = HFModel(
        TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1),
        build_model(config, device="cpu"),
        None,
    )
    print(
        "| documents | own attention | own positions | rows | one at a time |\n|---|---:|---:|---:|---:|"
    )
    for name, lengths in PACKS.items():
        ids = torch.randint(1024, (sum(lengths),))
        took = [
            timed(functools.partial(packed, model, way, ids, lengths), options.rounds)
            for way in WAYS
        ]
        took.append(timed(functools.partial(alone, model, ids, lengths), options.rounds))
        shown = " | ".join(f"{seconds / took[0]:.2f}" for seconds in took)
        print(f"| {name} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
