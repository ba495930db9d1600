"""Makes a student of half a base's depth: a HuggingFace folder with the first half of its layers.

    python scripts/quickstart/student.py --hf-model BASE --out DIR [--layers N]

Embeddings, the final norm and the output layer are the base's too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_student(base: str, out: str, layers: int | None = None) -> None:
    """Write a model of the first `layers` layers of a base, by default half of them, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    kept = layers or max(1, model.config.num_hidden_layers // 2)
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[:kept])
    model.config.num_hidden_layers = kept
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:kept]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Makes a student of half a base's depth.")
    parser.add_argument("--hf-model", required=True, metavar="BASE", help="HuggingFace folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--layers", type=int, metavar="N", help="keep N layers (default: half)")
    args = parser.parse_args(argv)
    make_student(args.hf_model, args.out, args.layers)


if __name__ == "__main__":
    main()
