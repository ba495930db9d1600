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
from itertools import chain, groupby
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
from data.sources.chunks import Chunk, first_rows
from data.sources.files import resolve_files
from data.sources.hub import load_dataset
from data.sources.readers import dataset_chunks, file_chunks
from data.tokenise.options import TokenizeOptions
from post_training.arguments.ranges import read_options
from post_training.batch.data_report import describe
from post_training.batch.splits import SPLITS, Split, plan_split
from post_training.errors import SetupError
from post_training.hf.tokenizer import open_tokenizer


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
    args = read_options(add_data_arguments(parser), argv)
    try:
        _preview(args)
    except (DataError, SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _preview(args: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(args.tokenizer, "--tokenizer")
    if args.data and args.finetune_data_files:
        raise DataError("give either --data or --finetune-data-files, which mean the same.")
    flag = "--data" if args.data else "--finetune-data-files"
    files = {"finetune_data_files": args.data or args.finetune_data_files}
    args = argparse.Namespace(**(vars(args) | files))
    settings = PrepareOptions(seq_length=args.seq_length, **option_fields(args, tokenizer))
    summaries, pages = [], []
    with contextlib.ExitStack() as stack:
        rows_out: IO[str] | None = None
        if args.json:
            rows_out = stack.enter_context(open_output(args.json))
        known: PrepareOptions | None = None
        for name, chunks, found in _sources(args, flag, settings):
            if found != known:
                known = found
                options, facts = tokenize_options(tokenizer, found)
                _say_masks(options, facts)
            special = set(options.added)
            shown, summary = 0, None
            for row, totals in preview_source(chunks, name, options):
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
    # `plan_split` asks for what a run's flags say.
    batch = {"num_epochs": None, "eval_global_batch_size": args.global_batch_size or 1}
    args = argparse.Namespace(**vars(args), **batch)
    splits: dict[str, Split] = {}
    for split in SPLITS:
        documents = prepare_documents_from_args(args, split, tokenizer)
        if documents is not None:
            splits[split] = plan_split(args, split, documents, tokenizer)
    print(describe(splits, args))


def _sources(
    args: argparse.Namespace, flag: str, settings: PrepareOptions
) -> Iterator[tuple[str, Iterator[Chunk], PrepareOptions]]:
    """Everything that is trained on: the name, the rows, and the settings with their format."""
    parsed = parse_weighted(args.finetune_data_files or ())
    if not parsed and not args.finetune_hf_dataset:
        raise DataError("there is no data: give --data FILES or --finetune-hf-dataset.")
    # With weights each entry is a source of its own, otherwise all files together are one.
    mixed = any(weight is not None for _, weight in parsed)
    entries = [[path] for path, _ in parsed] if mixed else [[path for path, _ in parsed]]
    for entry in entries if parsed else ():
        paths = resolve_files(entry, flag)
        chunks = first_rows(
            chain.from_iterable(file_chunks(path, 0) for path in paths), settings.max_rows
        )
        # The files of one source are in one format. Rows before the first in it are shown as bad.
        found = _with_format(settings, (piece for path in paths for piece in file_chunks(path, 0)))
        for name, own in groupby(chunks, key=lambda chunk: chunk.name):
            yield name, own, found
    if args.finetune_hf_dataset:
        ((name, _),) = parse_weighted([args.finetune_hf_dataset])
        settings, split = named_settings(name, settings, args.finetune_data_split)
        dataset = load_dataset(name, split)
        found = _with_format(settings, dataset_chunks(dataset, name))
        yield name, first_rows(dataset_chunks(dataset, name), settings.max_rows), found


def _with_format(settings: PrepareOptions, chunks: Iterator[Chunk]) -> PrepareOptions:
    name = settings.conversation_format
    name = name or first_format(chunks, settings.format_options, skip=True)
    return replace(settings, conversation_format=name)


def _say_masks(options: TokenizeOptions, facts: dict[str, Any]) -> None:
    separator = "none" if options.separator is None else options.added[options.separator]
    print(f"mask: {facts['mask_method']}; turns end with {facts['stops']}; separator {separator}")
    if options.day:
        print(f"date: the template writes {options.day} (--template-date)")
    for warning in facts["warnings"]:
        print(f"warning: {warning}")


if __name__ == "__main__":
    sys.exit(main())
