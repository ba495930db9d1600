"""Show what a finetuning run would train on, token by token: no GPU, no process group.

    python scripts/preview.py --tokenizer DIR --data train.jsonl --rows 3
    python scripts/preview.py --tokenizer DIR --data train.jsonl --json rows.jsonl --html page.html

Green tokens are trained. All data flags of finetune.py are understood: the totals at the end, or the
error, are those of the run, which then finds the data in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import IO, Any

from data.arguments import add_data_arguments
from data.errors import DataError
from data.prepare.options import PrepareOptions, tokenize_options
from data.prepare.prepare import first_format, named_settings
from data.prepare.splits import option_fields, parse_weighted, prepare_documents_from_args
from data.preview import (
    coloured,
    html_page,
    open_output,
    preview_source,
    row_title,
    summary_text,
    write_json_row,
)
from data.sources.chunks import Chunk
from data.sources.files import resolve_files
from data.sources.hub import load_dataset
from data.sources.readers import dataset_chunks, file_chunks
from post_training.batch.data_report import describe
from post_training.batch.splits import SPLITS, Split, plan_split


def main(argv: list[str] | None = None) -> int:
    """Run the preview; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="Folder or name of a tokenizer.")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="Files, folders or globs.")
    parser.add_argument("--seq-length", type=int, default=4096, help="Tokens in a pack.")
    parser.add_argument("--global-batch-size", type=int, default=None, help="For steps per epoch.")
    parser.add_argument("--seed", type=int, default=1234, help="The run's seed.")
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
    if args.global_batch_size is not None and args.global_batch_size < 1:
        raise DataError(f"--global-batch-size {args.global_batch_size}: expected 1 or more.")
    if args.rows < 0:
        raise DataError(f"--rows {args.rows}: expected 0 or more.")
    if args.data and args.finetune_data_files:
        raise DataError("give either --data or --finetune-data-files, which mean the same.")
    flag = "--data" if args.data else "--finetune-data-files"
    args.finetune_data_files = args.data or args.finetune_data_files
    settings = PrepareOptions(seq_length=args.seq_length, **option_fields(args))
    options, facts = tokenize_options(tokenizer, settings)
    separator = "none" if options.separator is None else options.added[options.separator]
    print(f"mask: {facts['mask_method']}; turns end with {facts['stops']}; separator {separator}")
    if options.day:
        print(f"date: the template writes {options.day} (--template-date)")
    for warning in facts["warnings"]:
        print(f"warning: {warning}")
    special = set(options.added)
    summaries, pages = [], []
    with contextlib.ExitStack() as stack:
        rows_out: IO[str] | None = None
        if args.json:
            rows_out = stack.enter_context(open_output(args.json))
        for name, chunks, columns in _sources(args, flag, settings):
            shown, summary = 0, None
            for row, totals in preview_source(chunks, name, replace(options, **columns)):
                summary = totals
                if rows_out is not None:
                    write_json_row(row, rows_out)
                if shown < args.rows:
                    shown += 1
                    print(f"\n--- {row_title(row)}")
                    print(coloured(row, special))
                    pages.append((row, special))
            if summary is None:
                raise DataError(f"{name}: there are no rows.")
            summaries.append(
                summary.as_dict(args.seq_length, args.global_batch_size, args.packing, args.seed)
            )
            print("\n" + summary_text(summaries[-1]))
    if args.html:
        with open_output(args.html) as page:
            page.write(html_page(pages, summaries))
    print("\nthe run")
    args.num_epochs, args.eval_global_batch_size = None, args.global_batch_size or 1
    splits: dict[str, Split] = {}
    for split in SPLITS:
        documents = prepare_documents_from_args(args, split, tokenizer)
        if documents is not None:
            splits[split] = plan_split(args, split, documents, tokenizer)
    print(describe(splits, args))


def _sources(
    args: argparse.Namespace, flag: str, settings: PrepareOptions
) -> Iterator[tuple[str, Iterator[Chunk], dict[str, Any]]]:
    """Everything that is trained on: the name, the rows, and their format and columns."""
    parsed = parse_weighted(args.finetune_data_files or ())
    if not parsed and not args.finetune_hf_dataset:
        raise DataError("there is no data: give --data FILES or --finetune-hf-dataset.")
    # With weights each entry is a source of its own, otherwise all files together are one.
    mixed = any(weight is not None for _, weight in parsed)
    entries = [[path] for path, _ in parsed] if mixed else [[path for path, _ in parsed]]
    for entry in entries:
        paths = resolve_files(entry, flag)
        # The files of one source are in one format. Rows before the first in it are shown as bad.
        chunks = chain.from_iterable(file_chunks(path, 0) for path in paths)
        columns = settings.format_options
        known = settings.conversation_format or first_format(chunks, columns, skip=True)
        for path in paths:
            yield str(path), file_chunks(path, 0), {"format": known}
    if args.finetune_hf_dataset:
        ((hub_name, _),) = parse_weighted([args.finetune_hf_dataset])
        settings, split = named_settings(hub_name, settings, args.finetune_data_split)
        columns = settings.format_options
        dataset = load_dataset(hub_name, split)
        known = settings.conversation_format or first_format(
            dataset_chunks(dataset, hub_name), columns, skip=True
        )
        yield (
            hub_name,
            dataset_chunks(dataset, hub_name),
            {"format": known, "mapping": columns},
        )


if __name__ == "__main__":
    sys.exit(main())
