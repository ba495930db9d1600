"""Makes the quickstart's own base model, tokenizer and dataset, reproducible byte for byte.

    python scripts/quickstart/task.py --out DIR [--seed N]

    DIR/base/         a HuggingFace folder: Qwen3 architecture with random float32 weights, and a
                      tokenizer with a chat template
    DIR/train.jsonl   rows {"kind": ..., "messages": [...]} to finetune on
    DIR/test.jsonl    500 held-out rows; the last assistant turn is the one right answer

The task is a small helpful assistant: it looks facts up in the system prompt and in earlier turns,
compares, sorts, counts, adds, translates and tells words apart. The kinds are chosen so that a
model of 0.6 million parameters learns them from nothing in about two minutes on a CPU, and each has
so many combinations that the held-out questions are new.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from post_training.inference.quiet import hush
from scripts.quickstart.base_model import make_model, make_tokenizer, save_tokenizer
from scripts.quickstart.rows import make_rows, write_jsonl


def make_task(out: Path, seed: int) -> None:
    """Writes ``base/``, ``train.jsonl`` and ``test.jsonl`` under ``out``.

    Args:
        out: folder to write to; made when it does not exist.
        seed: draws rows and weights; the same seed gives the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    train, test = make_rows(seed)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "test.jsonl", test)
    tokenizer = make_tokenizer(train)
    save_tokenizer(tokenizer, out / "base")
    make_model(tokenizer, seed).save_pretrained(out / "base")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Makes the quickstart's base model and dataset.")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write base/, train.jsonl and test.jsonl to",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the rows and the weights (default 0)"
    )
    args = parser.parse_args(argv)
    make_task(args.out, args.seed)


if __name__ == "__main__":
    hush()
    main()
