"""One whole model in one process: from a run's checkpoint of any layout, or from a HuggingFace folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from post_training.adapters.settings import LoraSettings
from post_training.arguments.completion import complete_inference, validate
from post_training.checkpoint.store import Checkpoint, chosen_checkpoint, latest_checkpoint
from post_training.checkpoint.torch_dcp import checkpoint_format, load_weights
from post_training.errors import SetupError
from post_training.files import DERIVED
from post_training.hf.folder import local_model_folder, weights_digest
from post_training.hf.tokenizer import load_tokenizer
from post_training.inference.arguments import arguments_of_hf_model, arguments_of_run
from post_training.job.output import MODEL_FOLDER
from post_training.platform.checkpoints.loading import CheckpointUnreadable
from post_training.recipes.recipe import read_yaml


@dataclass
class LoadedModel:
    """A model ready for inference."""

    model: Any
    """The unwrapped `GPTModel`, in evaluation mode."""
    tokenizer: Any
    args: argparse.Namespace
    source: str
    """Where it came from, for messages."""

    @property
    def vocabulary(self) -> int:
        """Tokens there really are, without padding."""
        return int(self.args.vocab_size)


# Megatron's configuration of a model whose weights lie in a checkpoint, or in a HuggingFace folder.
ModelConfig = Callable[[argparse.Namespace, Checkpoint | None], Any]


def load_model(
    model_config: ModelConfig,
    *,
    output_dir: str | None = None,
    hf_model: str | None = None,
    iteration: int | None = None,
    checkpoints: str | None = None,
) -> LoadedModel:
    """Build the model in this process and load its weights.

    Args:
        model_config: `model_provider.model_config`, which lies above this room.
        output_dir: folder of a run; its newest complete checkpoint is loaded, whatever parallel layout
            wrote it.
        hf_model: a HuggingFace folder or hub name instead.
        iteration: another checkpoint of the run than the newest.
        checkpoints: the folder that the run saved in, where it is another than one would look in.

    Raises:
        SetupError: neither or both are given, or there is no checkpoint, or it is damaged.
    """
    if (output_dir is None) == (hf_model is None):
        raise SetupError("give either --output-dir (a run) or --hf-model (a HuggingFace folder)")
    if hf_model is not None:
        args, checkpoint, source = arguments_of_hf_model(hf_model), None, hf_model
    else:
        assert output_dir is not None
        args, checkpoint = checkpoint_of_run(Path(output_dir), iteration, checkpoints)
        source = str(checkpoint.path)
    try:
        model = _build(args, checkpoint, model_config)
    except CheckpointUnreadable as error:
        raise SetupError(f"{source}: {error}; --iteration takes another checkpoint") from error
    return LoadedModel(model, load_tokenizer(args), args, source)


def checkpoint_of_run(
    folder: Path,
    iteration: int | None,
    checkpoints: str | None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[argparse.Namespace, Checkpoint]:
    """One checkpoint of a run, and arguments for its model.

    Args:
        folder: of the run.
        iteration: of the checkpoint; None: the newest.
        checkpoints: folder that it lies in, where it is another than one would look in.
        settings: as of `arguments_of_run`.

    Raises:
        SetupError: there is none, or its model cannot be had here.
    """
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise SetupError(f"--output-dir {folder}: holds no run (no config.yaml)")
    config = read_yaml(config_file)
    if DERIVED not in config:  # written last
        raise SetupError(f"{config_file}: is not whole, it has no {DERIVED}; restore the file")
    own = folder / "checkpoints"
    # The folder's own checkpoints first: it may be a copy of the one that config.yaml was written in.
    usual = own if latest_checkpoint(own) is not None else config.get("save") or own
    where = str(checkpoints or usual)
    checkpoint, complaint = chosen_checkpoint(where, iteration)
    if checkpoint is None:
        flag = f"--checkpoints {checkpoints}" if checkpoints else f"--output-dir {folder}"
        raise SetupError(f"{flag}: holds no complete checkpoint")
    if complaint is not None:
        print(f"warning: {complaint}; using {checkpoint.path}", file=sys.stderr)
    by_modelopt = checkpoint.has_modelopt
    if adapter_of(checkpoint) is not None:
        settings = {**_base_of(checkpoint, folder, config), **(settings or {})}
    args = arguments_of_run(folder, config, by_modelopt=by_modelopt, settings=settings)
    return args, checkpoint


def adapter_of(checkpoint: Checkpoint | None) -> LoraSettings | None:
    """The adapter that a checkpoint holds in the place of a whole model."""
    facts = ((checkpoint and checkpoint.manifest) or {}).get("origin", {}).get("lora")
    return None if facts is None else LoraSettings.of(facts)


def _base_of(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that name the base of an adapter's run, which lies where it was trained from.

    Raises:
        SetupError: it is not there, or has other weights now.
    """
    manifest, base = checkpoint.manifest or {}, str(config.get("hf_model"))
    kept = manifest["origin"]["lora"]["base"]
    try:
        found = weights_digest(local_model_folder(base), like=kept)
    except SetupError:
        found = None
    if found != kept:
        raise SetupError(
            f"{checkpoint.path} holds an adapter of the weights that --hf-model {base} had: they are not "
            f"there any more; put the base back, or its path into {folder / 'config.yaml'}"
        )
    return {"hf_model": base, "hf_tokenizer": str(folder / MODEL_FOLDER)}


def _build(
    args: argparse.Namespace, checkpoint: Checkpoint | None, model_config: ModelConfig
) -> Any:
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import set_global_variables

    if checkpoint is None:
        complete_inference(args)
    else:
        folder = str(checkpoint.path.parent)
        lora = adapter_of(checkpoint)
        complete_inference(args, load=folder, ckpt_step=checkpoint.iteration, lora=lora)
    validate(args)
    set_global_variables(args, build_tokenizer=False)
    # A store of its own: no port is opened and nobody is waited for.
    training.initialize_megatron(store=torch.distributed.HashStore())
    chunks, model = frozen_model(model_config(args, checkpoint))
    if checkpoint is not None:
        if checkpoint_format(checkpoint) == "torch_dcp":
            load_weights(model, checkpoint)
        else:
            checkpointing.load_checkpoint(chunks, None, None)
    return model


def frozen_model(config: Any) -> tuple[list[Any], Any]:
    """Build this rank's part of a model that is not trained.

    Args:
        config: Megatron's.

    Returns:
        Its one chunk in a list, as Megatron wraps it, and unwrapped, in evaluation mode.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model

    chunks = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    (model,) = unwrap_model(chunks)
    for parameter in model.eval().parameters():
        parameter.requires_grad_(False)
    return chunks, model
