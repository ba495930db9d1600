"""The output folder: what may be in it, room on its disk, and where logs go."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from post_training.config_file import resolved_config, write_config
from post_training.errors import SetupError
from post_training.fsdp_checkpoint import check_format
from post_training.hf_config import local_model_folder
from post_training.modelopt_state import latest_checkpoint

# In the output folder: configuration, tokenizer and chat template of the model, kept with its weights.
MODEL_FOLDER = "model"

# What makes a checkpoint's tensors fit a model.
ARCHITECTURE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "qk_layernorm",
    "add_qkv_bias",
    "rotary_base",
    "layernorm_epsilon",
    "num_experts",
    "moe_ffn_hidden_size",
)


def choose_checkpoint(args: argparse.Namespace) -> Path | None:
    """Set `args.load` to the folder to continue from and return its newest complete checkpoint.

    This run's own checkpoints come before `--load`: the same command, given again, continues.

    Raises:
        SetupError: `--load` holds no checkpoint, or the checkpoint is another model's.
    """
    # What --eval-only is to evaluate may be named outright.
    own = None if args.eval_only and args.load else latest_checkpoint(args.save)
    if own is not None:
        args.load = args.save
        args.finetune = False  # --finetune is about --load: this run has begun already
        checkpoint: Path | None = own
    elif args.load is not None:
        checkpoint = latest_checkpoint(args.load)
        if checkpoint is None:
            raise SetupError(
                f"--load {args.load}: holds no complete checkpoint "
                f"(no latest_checkpointed_iteration.txt)"
            )
    else:
        return None
    assert checkpoint is not None
    if not checkpoint.is_dir():
        raise SetupError(f"{checkpoint}: named by {args.load} as its newest, but not there")
    _check_same_model(args, checkpoint)
    return checkpoint


def _check_same_model(args: argparse.Namespace, checkpoint: Path) -> None:
    config_file = checkpoint.parent.parent / "config.yaml"
    written: dict[str, Any] = {}
    if config_file.is_file():
        written = yaml.safe_load(config_file.read_text()) or {}
    check_format(args, checkpoint, written)
    if written.get("no_save_optim") and not (
        args.no_load_optim or args.finetune or args.skip_train
    ):
        raise SetupError(
            f"{checkpoint} holds no optimizer state (it was saved with --no-save-optim): add "
            f"--no-load-optim to go on with a new optimizer, or choose another --output-dir"
        )
    for key in ARCHITECTURE_KEYS:
        if key in written and written[key] != getattr(args, key):
            raise SetupError(
                f"{checkpoint} is another model's checkpoint: its {key} is {written[key]}, this run's "
                f"is {getattr(args, key)}; choose another --output-dir or --load"
            )


def count_parameters(args: argparse.Namespace) -> int:
    """Parameters of the model that the flags describe."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    head_dim = args.kv_channels or hidden // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    matrices = 3 if args.swiglu else 2
    dense = matrices * hidden * (args.ffn_hidden_size or 4 * hidden)
    layers = args.num_layers
    sparse_layers = 0
    if args.num_experts:
        pattern = args.moe_layer_freq
        sparse_layers = sum(pattern) if isinstance(pattern, list) else layers // pattern
    experts = matrices * hidden * (args.moe_ffn_hidden_size or 0) * (args.num_experts or 0)
    embeddings = (args.padded_vocab_size or args.vocab_size or 0) * hidden
    embeddings *= 2 if args.untie_embeddings_and_output_weights else 1
    total = layers * attention + (layers - sparse_layers) * dense + sparse_layers * experts
    return int(total + embeddings)


def checkpoint_bytes(args: argparse.Namespace) -> int:
    """Size of one checkpoint: weights, and master weights with two Adam moments in fp32.

    With FSDP2 the weights are the master weights.
    """
    weight = 2 if (args.bf16 or args.fp16) and not args.use_torch_fsdp2 else 4
    optimizer = 0 if args.no_save_optim else (12 if args.optimizer == "adam" else 8)
    if args.use_torch_fsdp2:
        optimizer = max(0, optimizer - 4)
    return count_parameters(args) * (weight + optimizer)


def prepare_output(args: argparse.Namespace) -> None:
    """Make the output folder and check that it can be written and has room for a checkpoint.

    Raises:
        SetupError: the folder cannot be made or written, or its disk is too full.
    """
    folder = Path(args.output_dir)
    try:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--output-dir {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise SetupError(f"--output-dir {folder}: cannot be written")
    free = shutil.disk_usage(args.save).free
    needed = 0 if args.skip_train else checkpoint_bytes(args)
    if free < needed:
        raise SetupError(
            f"--output-dir {folder}: a checkpoint takes {needed / 2**30:.1f} GiB, its disk has "
            f"{free / 2**30:.1f} GiB free; make room or choose another folder"
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
    console = os.fdopen(os.dup(2), "w", buffering=1)
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
    logging.captureWarnings(True)
    return console


def save_model_folder(args: argparse.Namespace, tokenizer: Any) -> None:
    """Keep configuration, tokenizer, chat template and generation defaults beside the checkpoints."""
    if args.rank != 0:
        return
    folder = Path(args.output_dir) / MODEL_FOLDER
    folder.mkdir(exist_ok=True)
    if args.chat_template:
        from data.tokenizer_facts import template_source

        tokenizer.chat_template = template_source(tokenizer, args.chat_template)
    tokenizer.save_pretrained(folder)
    if args.hf_config is None:
        return
    args.hf_config.save_pretrained(folder)
    source = local_model_folder(args.hf_model)
    defaults = source / "generation_config.json"
    if defaults.is_file() and source.resolve() != folder.resolve():
        shutil.copyfile(defaults, folder / defaults.name)


def check_identity(args: argparse.Namespace, documents: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other base weights or other data, and remember both on the first start.

    A position in the data is a number of packs of one plan, and a checkpoint belongs to one base model:
    with another of either the run would go on without a word, and its numbers would mean nothing.

    Raises:
        SetupError: naming what differs from when the run began.
    """
    file = Path(args.output_dir) / "identity.json"
    now: dict[str, Any] = {"base_weights": _weights_digest(args)}
    for key in ("seq_length", "seed", "packing", "global_batch_size"):
        now[key] = getattr(args, key)
    if "train" in documents:  # last: the prepared data depends on --seq-length
        now["data"] = documents["train"].fingerprint
    if latest_checkpoint(args.save) is None or args.skip_train:
        if args.rank == 0 and not args.skip_train:
            partial = file.with_name(file.name + ".partial")
            partial.write_text(json.dumps(now, indent=1) + "\n")
            partial.replace(file)
        return
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    what = {"base_weights": "the weights of --hf-model", "data": "the training data"}
    for key, value in now.items():
        if before.get(key, value) != value:
            name = what.get(key, f"--{key.replace('_', '-')} (then {before[key]}, now {value})")
            raise SetupError(
                f"--output-dir {args.output_dir} holds a run that was started with other values: "
                f"{name} differs; give the same again to continue it, or choose another --output-dir "
                f"(and --load {args.save} --finetune to start from its weights)"
            )


def _weights_digest(args: argparse.Namespace) -> str | None:
    """A digest of samples of the weight files: the same for the same base model, wherever it lies."""
    if args.hf_config is None or args.random_weights:
        return None
    digest = hashlib.sha256()
    for path in sorted(local_model_folder(args.hf_model).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()
