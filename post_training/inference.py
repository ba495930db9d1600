"""One whole model in one process: from a run's checkpoint of any layout, or from a HuggingFace folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from post_training.arguments import parse_arguments, validate
from post_training.checkpoints import (
    chosen_checkpoint,
    iteration_of,
    latest_checkpoint,
)
from post_training.errors import SetupError
from post_training.fsdp_checkpoint import checkpoint_format, load_weights
from post_training.output import MODEL_FOLDER
from post_training.tokenizer import load_tokenizer

# The layout that a run's config.yaml names is not there in this process, and nothing is trained.
ONE_PROCESS: dict[str, int | str | None] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "microbatch_group_size_per_vp_stage": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "micro_batch_size": 1,
    "eval_micro_batch_size": None,
    "global_batch_size": None,
    "eval_global_batch_size": None,
    "use_torch_fsdp2": False,
    "save_hf": False,
    "ckpt_format": "torch_dist",
}


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


def load_model(
    *, output_dir: str | None = None, hf_model: str | None = None, iteration: int | None = None
) -> LoadedModel:
    """Build the model in this process and load its weights.

    Args:
        output_dir: folder of a run; its newest complete checkpoint is loaded, whatever parallel layout
            wrote it.
        hf_model: a HuggingFace folder or hub name instead.
        iteration: another checkpoint of the run than the newest.

    Raises:
        SetupError: neither or both are given, or there is no checkpoint.
    """
    if (output_dir is None) == (hf_model is None):
        raise SetupError("give either --output-dir (a run) or --hf-model (a HuggingFace folder)")
    if hf_model is not None:
        # Nothing is written there: the parser wants a run's folder.
        flags = ["--hf-model", hf_model, "--output-dir", tempfile.gettempdir(), "--skip-train"]
        args = parse_arguments(flags)
        args.load = args.save = None
        source = hf_model
    else:
        assert output_dir is not None
        args, source = _arguments_of_run(output_dir, iteration)
    model = _build(args)
    return LoadedModel(model, load_tokenizer(args), args, source)


def _arguments_of_run(output_dir: str, iteration: int | None) -> tuple[argparse.Namespace, str]:
    folder = Path(output_dir)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise SetupError(f"--output-dir {folder}: holds no run (no config.yaml)")
    config = yaml.safe_load(config_file.read_text())
    flags = ["--config", str(config_file), "--output-dir", str(folder), "--skip-train"]
    if config.get("hf_model"):
        flags += ["--hf-model", str(folder / MODEL_FOLDER)]
    if config.get("hf_tokenizer"):
        flags += ["--hf-tokenizer", str(folder / MODEL_FOLDER)]
    args = parse_arguments(flags, overrides=ONE_PROCESS)
    own = folder / "checkpoints"
    # The folder's own checkpoints first: it may be a copy of the one that config.yaml was written in.
    args.load = str(own if latest_checkpoint(own) is not None else config.get("save") or own)
    checkpoint, complaint = chosen_checkpoint(args.load, iteration)
    if checkpoint is None:
        raise SetupError(f"--output-dir {folder}: holds no complete checkpoint")
    if complaint is not None:
        print(f"warning: {complaint}; using {checkpoint}", file=sys.stderr)
    # Whatever the tracker file names.
    args.ckpt_step = iteration_of(checkpoint)
    args.save = None
    return args, str(checkpoint)


def _build(args: argparse.Namespace) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import set_global_variables

    from model_provider import model_config

    args.tensorboard_dir = None
    args.wandb_project = ""
    args.no_load_optim = args.no_load_rng = True
    args.exit_signal_handler = False
    args.use_distributed_optimizer = False
    validate(args)
    set_global_variables(args, build_tokenizer=False)
    # A store of its own: no port is opened and nobody is waited for.
    training.initialize_megatron(store=torch.distributed.HashStore())
    config = model_config(args)
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    model = unwrap_model(chunks)[0].eval()
    if args.load is not None:
        checkpoint = Path(checkpointing.get_load_checkpoint_path_by_args(args))
        if checkpoint_format(checkpoint) == "torch_dcp":
            load_weights(model, checkpoint)
        else:
            checkpointing.load_checkpoint(chunks, None, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@torch.inference_mode()
def logits(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of one sequence without a cache: float32 [tokens, vocabulary]."""
    device = next(loaded.model.parameters()).device
    row = torch.tensor([tokens], device=device)
    positions = torch.arange(len(tokens), device=device).unsqueeze(0)
    out = loaded.model(row, positions, None)
    return out[0, :, : loaded.vocabulary].float()
