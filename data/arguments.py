"""The data flags, added to whatever parser the entry point uses (Megatron's, in training)."""

from __future__ import annotations

import argparse
import contextlib

from data.packs.plan import PACKING_MODES
from data.rows.choices import ANSWER_FORMS
from data.rows.registry import FORMAT_NAMES


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every data flag to ``parser``, leaving alone those that it has already.

    Megatron's own ``--chat-template``, ``--seed`` and ``--seq-length`` mean the same here.
    """
    add = parser.add_argument_group(title="finetuning data").add_argument
    add("--finetune-data-files", nargs="+", default=None, metavar="PATH",
        help="Training data: json, jsonl, parquet or csv files (also .gz, .zst), folders or globs; "
        "PATH=WEIGHT mixes sources by their share of tokens.")  # fmt: skip
    add("--finetune-hf-dataset", default=None, metavar="NAME",
        help="Training data: a dataset of the HuggingFace hub, or a local folder; NAME=WEIGHT mixes it "
        "with files.")  # fmt: skip
    add("--finetune-data-split", default="train", metavar="SPLIT",
        help="Split of --finetune-hf-dataset to train on.")  # fmt: skip
    add("--valid-data-files", nargs="+", default=None, metavar="PATH",
        help="Validation data.")  # fmt: skip
    add("--test-data-files", nargs="+", default=None, metavar="PATH", help="Test data.")
    add("--split-ratio", default=None, metavar="TRAIN,VALID,TEST",
        help="Cut the training data into disjoint splits instead, such as 0.98,0.01,0.01.")  # fmt: skip
    add("--conversation-format", default=None, metavar="NAME",
        help=f"Format of the rows: {', '.join(FORMAT_NAMES)}, or package.module:function. "
        "Detected when not given.")  # fmt: skip
    add("--system-key", default=None, metavar="COLUMN", help="Column with a system prompt.")
    add("--prompt-key", default=None, metavar="COLUMN",
        help="Column with the question (instruction).")  # fmt: skip
    add("--query-key", default=None, metavar="COLUMN",
        help="Column that is appended to the question.")  # fmt: skip
    add("--response-key", default=None, metavar="COLUMN", help="Column with the answer (output).")
    add("--messages-key", default=None, metavar="COLUMN", help="Column with a list of messages.")
    add("--choice-key", default=None, metavar="COLUMN",
        help="Column with the choices of a question, a list or its literal (choices).")  # fmt: skip
    add("--answer-key", default=None, metavar="COLUMN",
        help="Column with the right choice: an index, a letter or its text (correct_answer).")  # fmt: skip
    add("--image-keys", nargs="+", default=None, metavar="COLUMN",
        help="Columns with pictures: paths, bytes, or objects of them (images, image).")  # fmt: skip
    add("--kind-key", default=None, metavar="COLUMN",
        help="Column with a row's kind, by which --answer-tokens tells accuracy too (kind).")  # fmt: skip
    add("--answer-form", choices=ANSWER_FORMS, default=ANSWER_FORMS[0],
        help="How the right choice is said.")  # fmt: skip
    add("--min-pixels", type=int, default=None, metavar="N",
        help="Smaller pictures are enlarged to so many pixels (default: the processor's).")  # fmt: skip
    add("--max-pixels", type=int, default=None, metavar="N",
        help="Larger pictures are made smaller to so many pixels (default: the processor's).")  # fmt: skip
    add("--image-cache", default=None, metavar="FOLDER",
        help="Where pictures that rows embed are kept, encoded as they are. Default: pictures in "
        "--data-cache-dir.")  # fmt: skip
    add("--max-prompt-length", type=int, default=None, metavar="N",
        help="A row with more tokens before its first trained one is over-long too.")  # fmt: skip
    add("--ignore-columns", nargs="+", default=None, metavar="NAME",
        help="Columns, and fields such as message.NAME, that are left out without a warning.")  # fmt: skip
    add("--strict-columns", action="store_true",
        help="A column or field that nothing reads makes a bad row.")  # fmt: skip
    add("--max-rows", type=int, default=None, metavar="N",
        help="Read only the first N rows of each source, for a first try.")  # fmt: skip
    add("--on-bad-row", choices=("error", "skip"), default="error",
        help="Stop at the first bad row, or count and list bad rows and go on.")  # fmt: skip
    add("--overlong", choices=("drop", "error", "trim-turns"), default="drop",
        help="What happens to documents longer than --seq-length: dropped and counted, an error, "
        "or their oldest turns are left out.")  # fmt: skip
    add("--reasoning", choices=("keep", "last", "mask"), default="keep",
        help="Train all reasoning, only the last turn's, or none; all of it stays in.")  # fmt: skip
    add("--loss-on", choices=("all", "last"), default="all",
        help="Train all assistant turns, or the last: all that the assistant says after the last "
        "question.")  # fmt: skip
    add("--separator", default="auto", metavar="TOKEN",
        help="Token after each document, never trained: auto, none, or a special token.")  # fmt: skip
    add("--chat-template-variables", default=None, metavar="JSON",
        help='Further template variables, such as {"enable_thinking": false}.')  # fmt: skip
    add("--trust-generation-blocks", action="store_true",
        help="Train what a template's {%% generation %%} blocks enclose, as they are, also where they "
        "contradict what follows from its generation prompt.")  # fmt: skip
    add("--template-date", default=None, metavar="YYYY-MM-DD",
        help="The day that a template's clock says (strftime_now). Default: that of the run's first start, "
        "which a resume keeps.")  # fmt: skip
    add("--data-cache-dir", default=None, metavar="DIR",
        help="Folder of tokenised data, shared between runs and nodes. Default: sft-data in "
        "$XDG_CACHE_HOME or ~/.cache.")  # fmt: skip
    add("--data-workers", type=int, default=None, metavar="N",
        help="Processes that tokenise; one a core when not given.")  # fmt: skip
    add("--packing", choices=PACKING_MODES, default="best-fit",
        help="How documents are put together into packs of --seq-length tokens.")  # fmt: skip
    # The host parser may have it, with the same meaning.
    with contextlib.suppress(argparse.ArgumentError):
        add("--chat-template", default=None, metavar="FILE",
            help="File or name of a chat template to use instead of the tokenizer's.")  # fmt: skip
    return parser
