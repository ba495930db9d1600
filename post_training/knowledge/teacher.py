"""The teacher of a student: a frozen model beside it, cut into the same tensor parallel parts and stages.

It is no part of the student's module tree: optimizer, checkpoints and exports do not know of it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from post_training.arguments.completion import complete_inference, validate
from post_training.checkpoint.store import Checkpoint, iteration_of, latest_checkpoint
from post_training.checkpoint.torch_dcp import checkpoint_format, load_weights
from post_training.errors import SetupError
from post_training.hf.tokenizer import load_tokenizer
from post_training.inference.arguments import arguments_of_hf_model
from post_training.inference.load import (
    ModelConfig,
    adapter_of,
    checkpoint_of_run,
    frozen_model,
)
from post_training.inference.quiet import quiet_libraries

# What a teacher shares with its student: how it is cut, what it computes with, and the packs.
_SHARED = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("sequence_parallel", "transformer_impl", "attention_backend", "cp_comm_type"),
    *("seq_length", "bf16", "fp16", "trust_remote_code"),
)


@dataclass(frozen=True)
class Teacher:
    """A model that was found."""

    args: argparse.Namespace
    """Validated, of the run's layout."""
    checkpoint: Checkpoint | None
    """Where its weights lie; None: in the HuggingFace folder."""


def choose_teacher(args: argparse.Namespace) -> Teacher | None:
    """Find the teacher of `--export-kd-teacher-load`, before any process group starts.

    Args:
        args: resolved arguments of the student's run.

    Returns:
        None where the run has none.

    Raises:
        SetupError: there is no such model, its vocabulary is another, or it does not fit the layout.
    """
    name = args.export_kd_teacher_load
    if name is None:
        return None
    flag = f"--export-kd-teacher-load {name}"
    settings = {key: getattr(args, key) for key in _SHARED}
    settings = {
        key: value.name if isinstance(value, Enum) else value
        for key, value in settings.items()
        if value is not None
    }
    try:
        found, checkpoint = _found(Path(name), settings)
    except SetupError as error:
        raise SetupError(f"{flag}: {error}") from error
    if checkpoint is not None and checkpoint.has_modelopt:
        raise SetupError(f"{flag}: {checkpoint.path} is of a model that ModelOpt converted")
    if checkpoint is not None and checkpoint_format(checkpoint) == "torch_dcp":
        if args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1:
            raise SetupError(
                f"{flag}: a checkpoint of --use-torch-fsdp2 is read whole, without tensor or pipeline "
                f"parallelism; export it with scripts/export_hf.py"
            )
    if found.num_experts:
        raise SetupError(f"{flag}: a teacher with experts is not supported; choose a dense one")
    if found.vocab_size != args.vocab_size or found.padded_vocab_size != args.padded_vocab_size:
        raise SetupError(
            f"{flag}: its vocabulary has {found.vocab_size} entries, the student's {args.vocab_size}; "
            f"they must be the same tokens"
        )
    if load_tokenizer(found).get_vocab() != load_tokenizer(args).get_vocab():
        raise SetupError(f"{flag}: its tokenizer gives tokens other ids than the student's")
    complete_inference(found, lora=adapter_of(checkpoint))
    try:
        with quiet_libraries():  # Megatron prints all arguments
            validate(found)
    except SetupError as error:
        raise SetupError(f"{flag}: {error}") from error
    return Teacher(found, checkpoint)


def _found(folder: Path, settings: dict[str, Any]) -> tuple[argparse.Namespace, Checkpoint | None]:
    """Of a run's folder, its folder of checkpoints, one of these, or a HuggingFace model."""
    if (folder / "config.yaml").is_file():
        return checkpoint_of_run(folder, None, None, settings)
    iteration = iteration_of(folder)
    one = iteration is not None and folder.is_dir()
    checkpoints = folder.parent if one else folder
    if latest_checkpoint(checkpoints) is not None:
        run = checkpoints.parent
        if not (run / "config.yaml").is_file():
            raise SetupError(
                f"no config.yaml in {run} says what model its checkpoints are of; name a run's folder, or "
                f"a HuggingFace folder (scripts/export_hf.py)"
            )
        return checkpoint_of_run(run, iteration if one else None, str(checkpoints), settings)
    return arguments_of_hf_model(str(folder), settings=settings), None


def build_teacher(teacher: Teacher, model_config: ModelConfig) -> Any:
    """This rank's part of a teacher, with its weights; on all ranks.

    Args:
        teacher: what was found.
        model_config: `model_provider.model_config`, which lies above this room.

    Returns:
        The unwrapped `GPTModel`, frozen, in evaluation mode.
    """
    from megatron.core import dist_checkpointing

    _, model = frozen_model(model_config(teacher.args, teacher.checkpoint))
    if teacher.checkpoint is None:
        return model
    if checkpoint_format(teacher.checkpoint) == "torch_dcp":
        load_weights(model, teacher.checkpoint)
        return model
    folder = str(teacher.checkpoint.path)
    metadata = dist_checkpointing.load_content_metadata(folder)
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(state, folder)["model"])
    return model
