"""The output folder: room on its disk, what lies in it beside checkpoints, and where logs go."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

from post_training.arguments.config_file import resolved_config, write_config
from post_training.errors import SetupError
from post_training.hf.config_json import with_limit, write_model_config
from post_training.hf.folder import (
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_export,
    copy_files,
    local_model_folder,
    local_tokenizer_folder,
    write_template,
)
from post_training.job import run_lock
from post_training.layout.model_size import checkpoint_bytes, shown_bytes
from post_training.machine.disk import log_stream
from post_training.metrics.records import DATA_REPORT, STARTS
from post_training.metrics.trackers import IDS

# In the output folder: configuration, tokenizer and chat template of the model, kept with its weights.
MODEL_FOLDER = "model"
# Files that a run writes there, and reads back.
_FILES = (
    *("config.yaml", "metrics.jsonl", "evaluations.jsonl", "train.log", "eval.log"),
    *("report.html", STARTS, DATA_REPORT, IDS),
)


def prepare_output(args: argparse.Namespace) -> None:
    """Make the output folder and check that it can be written and has room for a checkpoint.

    Raises:
        SetupError: the folder cannot be made or written, its disk is too full, or another run trains in it.
    """
    folder = Path(args.output_dir)
    for name in ("output_dir", "save", "tensorboard_dir", "wandb_save_dir"):
        own = name in args.in_output_dir
        path = Path(getattr(args, name) or folder)
        try:
            # Made by a writer otherwise, on the last rank, when all have started.
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            flag = "--output-dir" if own else f"--{name.replace('_', '-')}"
            raise SetupError(f"{flag} {path}: {error.strerror}") from error
    if args.rank == 0 and (folder / MODEL_FOLDER).exists() and not (folder / MODEL_FOLDER).is_dir():
        raise SetupError(f"--output-dir {folder}: {MODEL_FOLDER} is no folder; move it away")
    if not os.access(folder, os.W_OK):
        raise SetupError(f"--output-dir {folder}: cannot be written")
    for name in _FILES:
        file = folder / name
        if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
            raise SetupError(
                f"--output-dir {folder}: {name} is no file that can be written; move it away"
            )
    if args.save_hf:
        check_export(folder / "hf", folder)
    run_lock.hold(args, wait=0.0)  # a folder that was there before is held already
    free = shutil.disk_usage(args.save).free
    needed = 0 if args.skip_train else checkpoint_bytes(args)
    if free < needed:
        raise SetupError(
            f"--output-dir {folder}: a checkpoint takes {shown_bytes(needed)}, its disk has "
            f"{shown_bytes(free)} free; make room or choose another folder"
        )


def save_config(args: argparse.Namespace) -> dict[str, Any]:
    """Write `config.yaml` on rank 0 and return what it holds."""
    config = resolved_config(args)
    if args.rank == 0:
        write_config(config, args.derived, Path(args.output_dir) / "config.yaml")
    return config


def redirect_logs(args: argparse.Namespace) -> TextIO:
    """Send everything that Megatron and its libraries print to `train.log`.

    Returns:
        The console as it was: for the progress bar, messages and errors of this project.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    console = log_stream(os.dup(2), owned=True)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node = args.rank // local_world
    # One file a node: appends of one machine do not mix inside a line, those of several may.
    name = "eval" if args.eval_only else "train"
    name += ".log" if node == 0 else f".node{node}.log"
    log = os.open(Path(args.output_dir) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    sys.stdout, sys.stderr = log_stream(1), log_stream(2)
    logging.captureWarnings(True)
    return console


def set_pixels(folder: Path, least: int | None, most: int | None) -> None:
    """Let the image processor of a folder resize pictures as the run does, for whoever reads it later."""
    for file in (folder / name for name in PROCESSOR_FILES[:2]):
        if file.is_file() and (least or most):
            written = json.loads(file.read_text(encoding="utf-8"))
            own = written.get("image_processor", written)
            size = own.setdefault("size", {})
            bounds = (("shortest_edge", "min_pixels", least), ("longest_edge", "max_pixels", most))
            for edge, old, given in bounds:
                size[edge] = given or size.get(edge) or own.get(old)
                own.pop(old, None)
            if size["shortest_edge"] is None or size["shortest_edge"] > (most or math.inf):
                size["shortest_edge"] = most
            file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_model_folder(args: argparse.Namespace, tokenizer: Any) -> None:
    """Keep configuration, tokenizer, chat template and generation defaults beside the checkpoints."""
    if args.rank != 0:
        return
    folder = Path(args.output_dir) / MODEL_FOLDER
    folder.mkdir(exist_ok=True)
    copy_files(local_tokenizer_folder(args.hf_tokenizer or args.hf_model), folder, TOKENIZER_FILES)
    set_pixels(folder, args.min_pixels, args.max_pixels)
    if args.chat_template:
        from data.templates.tokenizer_facts import template_source

        write_template(folder, template_source(tokenizer, args.chat_template))
    elif not tokenizer.chat_template and args.finetune_hf_dataset:
        from data.prepare.prepare import dataset_template
        from data.prepare.splits import parse_weighted

        ((name, _),) = parse_weighted([args.finetune_hf_dataset])
        if template := dataset_template(name):
            write_template(folder, template)
    if args.hf_config is None:
        return
    source = local_model_folder(args.hf_model)
    copy_files(source, folder, MODEL_FILES)
    if args.model_backend == "transformers":
        copy_files(source, folder, ["config.json"])
    else:
        write_model_config(with_limit(args.hf_config, args.seq_length), folder, source)
