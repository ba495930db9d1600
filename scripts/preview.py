"""Show what a finetuning run would train on, token by token: no GPU, no process group.

    python scripts/preview.py --tokenizer DIR --data train.jsonl --rows 3
    python scripts/preview.py --tokenizer DIR --data train.jsonl --json rows.jsonl --html page.html

Green tokens are trained. All data flags of finetune.py are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data.arguments import add_data_arguments, option_fields, parse_weighted
from data.errors import DataError
from data.prepare import load_dataset
from data.prepare_options import PrepareOptions, tokenize_options
from data.preview import (
    coloured,
    html_page,
    open_output,
    preview_source,
    summary_text,
    write_json_row,
)
from data.sources import Chunk, dataset_chunks, file_chunks, resolve_files


def main(argv: list[str] | None = None) -> int:
    """Run the preview; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="Folder or name of a tokenizer.")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="Files, folders or globs.")
    parser.add_argument("--seq-length", type=int, default=4096, help="Tokens in a pack.")
    parser.add_argument("--global-batch-size", type=int, default=None, help="For steps per epoch.")
    parser.add_argument("--rows", type=int, default=3, help="Rows to show of each source.")
    parser.add_argument("--json", metavar="OUT", help="Write one JSON object a row.")
    parser.add_argument("--html", metavar="OUT", help="Write a coloured page.")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    try:
        _preview(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _preview(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"--tokenizer {args.tokenizer}: cannot be loaded ({first}).") from error
    settings = PrepareOptions(seq_length=args.seq_length, **option_fields(args))
    options, facts = tokenize_options(tokenizer, settings)
    print(f"mask: {facts['mask_method']}; turns end with {facts['stops']}")
    for warning in facts["warnings"]:
        print(f"warning: {warning}")
    special = set(options.added)
    summaries, pages = [], []
    with contextlib.ExitStack() as stack:
        rows_out: IO[str] | None = None
        if args.json:
            rows_out = stack.enter_context(open_output(args.json))
        for name, chunks in _sources(args):
            shown, summary = 0, None
            for row, totals in preview_source(chunks, name, options):
                summary = totals
                if rows_out is not None:
                    write_json_row(row, rows_out)
                if shown < args.rows:
                    shown += 1
                    print(f"\n--- {row.raw.place}: {row.status} {row.reason}")
                    print(coloured(row, special))
                    pages.append((row, special))
            if summary is None:
                raise DataError(f"{name}: there are no rows.")
            summaries.append(summary.as_dict(args.seq_length, args.global_batch_size))
            print("\n" + summary_text(summaries[-1]))
    if args.html:
        with open_output(args.html) as page:
            page.write(html_page(pages, summaries))


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[Chunk]]]:
    files = [
        *(args.data or ()),
        *(path for path, _ in parse_weighted(args.finetune_data_files or ())),
    ]
    if not files and not args.finetune_hf_dataset:
        raise DataError("there is no data: give --data FILES or --finetune-hf-dataset.")
    flag = "--data" if args.data else "--finetune-data-files"
    for number, path in enumerate(resolve_files(files, flag)):
        yield str(Path(path)), file_chunks(path, number)
    if args.finetune_hf_dataset:
        dataset = load_dataset(args.finetune_hf_dataset, args.finetune_data_split)
        yield args.finetune_hf_dataset, dataset_chunks(dataset, args.finetune_hf_dataset)


if __name__ == "__main__":
    sys.exit(main())
