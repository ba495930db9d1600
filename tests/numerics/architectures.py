"""Which way keeps packed documents apart in each architecture: the table of docs/hf_models.md.

    python tests/numerics/architectures.py                 all; exit status 1 if one is not right in its way
    python tests/numerics/architectures.py gpt2 mamba2     some

A tiny model of each, with random weights, is tried as a run tries it (`post_training/hf_models/probe.py`).
Then, in longer documents than its windows, the logits of the pack are compared with those of each document
alone, and one document is changed, which must not move a bit of the others.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tests/data would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from post_training import platform

platform.apply()

import torch
import transformers
from megatron.core.transformer import TransformerConfig

from post_training.errors import RunStopped
from post_training.hf.causal_lm import build_model
from post_training.hf_models.model import HFModel
from post_training.hf_models.probe import choose_way
from post_training.model.router import RepeatedChoices
from tests.helpers.architectures import ARCHITECTURES, VOCABULARY, tiny

# Longer and shorter than the windows of 64, and of one token.
LENGTHS = [70, 3, 100, 1, 26]
CLOSE = 1e-5


def wrapped(family: str) -> HFModel:
    """A tiny model of an architecture, in one process without a group."""
    torch.manual_seed(0)
    model = build_model(tiny(family), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.06)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    return HFModel(config, model, None).eval()


@torch.no_grad()
def compare(model: HFModel, way: str) -> tuple[float, int]:
    """Largest difference of a packed document's logits to it alone, and others' that a change moves."""
    ids = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    begin = sum(LENGTHS[:2])
    changed[begin + 30 : begin + LENGTHS[2]] = (
        ids[begin + 30 : begin + LENGTHS[2]] + 7
    ) % VOCABULARY
    every = torch.arange(len(ids))
    passes = []
    with RepeatedChoices() as choices:
        for row in (ids, changed):
            choices.next_pass()
            passes.append(model.packed_logits(way, row, LENGTHS, every))
    model.documents.begin("stock", None)
    alone = torch.cat([model.run(d.unsqueeze(0), None, None)[0] for d in ids.split(LENGTHS)])
    others = (every < begin + 30) | (every >= begin + LENGTHS[2])
    moved = (passes[0] != passes[1]).any(-1)
    return float((passes[0] - alone).abs().max()), int(moved[others].sum())


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types (default: all)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print("| model type | class | way | to alone | why no earlier way |\n|---|---|---|---:|---|")
    wrong = []
    for name in options.names or sorted(ARCHITECTURES):
        model, told = wrapped(name), list[str]()
        try:
            way = choose_way(model, told.append)
        except RunStopped as error:
            print(f"| `{name}` | {type(model.model).__name__} | none | | {error} |", flush=True)
            wrong.append(name)
            continue
        apart, moved = compare(model, way)
        if apart > CLOSE or moved:
            wrong.append(name)
        reasons = told[0].partition(" (")[2].removesuffix(")").replace("; ", "<br>")
        moves = f", {moved} tokens of others move" if moved else ""
        print(
            f"| `{name}` | {type(model.model).__name__} | {way} | {apart:.0e}{moves} | {reasons} |",
            flush=True,
        )
    print(
        f"\n{len(options.names or ARCHITECTURES) - len(wrong)} architectures are exact; not: {wrong}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
