r"""Exact-match accuracy of a run's checkpoint or a HuggingFace folder on held-out rows.

python scripts/evaluate.py --output-dir runs/first --data test.jsonl --json runs/first/test.json
python scripts/evaluate.py --hf-model runs/first/hf --model-backend transformers --data gsm8k/test.jsonl \
    --answer-pattern '#### (.+)'

The last assistant turn of each row is the right answer; the model answers the turns before it. Every
row counts. Rows may have pictures; of rows with choices the choice is compared that an answer takes
(post_training/inference/choices.py has the rules).
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

from post_training import platform

platform.apply()

from data import DataError
from data.rows.converters import FormatOptions
from model_provider import model_config
from post_training.arguments.ranges import SEED, read_options
from post_training.errors import SetupError
from post_training.inference.backends import answering_parser, open_backend
from post_training.inference.exact_match import evaluate, read_questions
from post_training.inference.quiet import hush

_COLUMNS = {
    "prompt": "the question",
    "choice": "its choices",
    "answer": "the right choice",
    "kind": "the kind of the row, by which accuracy is told too",
}


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Flags that name the columns of rows with choices, as training has them."""
    for name, what in _COLUMNS.items():
        default = "kind" if name == "kind" else None
        parser.add_argument(f"--{name}-key", metavar="COLUMN", default=default, help=what)
    parser.add_argument("--image-keys", nargs="+", metavar="COLUMN", help="pictures")


def columns(options: argparse.Namespace) -> FormatOptions:
    """The columns that the flags name."""
    return FormatOptions(
        prompt_key=options.prompt_key,
        choice_key=options.choice_key,
        answer_key=options.answer_key,
        image_keys=tuple(options.image_keys) if options.image_keys else None,
        ignore_columns=(options.kind_key,),
    )


def main() -> int:
    """Entry point; returns the exit status."""
    parser = answering_parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="files of held-out rows")
    parser.add_argument("--answer-pattern", metavar="REGEX", help="compare only what it finds")
    add_columns(parser)
    parser.add_argument("--json", metavar="FILE", help="write the scores and every answer")
    options = read_options(parser, seed=SEED)
    hush()
    try:
        pattern = re.compile(options.answer_pattern) if options.answer_pattern else None
    except re.error as error:
        print(f"error: --answer-pattern: {error}", file=sys.stderr)
        return 2
    try:
        questions = read_questions(options.data, columns(options), options.kind_key)
        if options.json:
            with Path(options.json).open("a"):  # rather now than after all answers
                pass
        backend = open_backend(options, model_config)
        begin = time.perf_counter()
        scores = evaluate(backend, questions, pattern)
    except (SetupError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin
    print(f"{backend.source} ({backend.name}, {seconds:.1f} s)\n{scores.table()}")
    if options.json:
        result = {
            "model": backend.source,
            "backend": backend.name,
            "data": options.data,
            **scores.facts(),
        }
        Path(options.json).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
