"""What a model takes: its parameters, and the bytes of a checkpoint."""

from __future__ import annotations

import argparse

from post_training.adapters.settings import chosen_targets, trained_parameters
from post_training.hf.causal_lm import build_model
from post_training.layout.parameters import stage_parameters

_ONE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "num_virtual_stages_per_pipeline_rank": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
}


def count_parameters(args: argparse.Namespace) -> int:
    """Parameters of the model that the flags or its configuration describe."""
    if args.model_backend == "transformers":
        if args.hf_config is None:
            return 0  # a task's own model, which nobody has seen yet
        model = build_model(args.hf_config, trust_remote_code=args.trust_remote_code)
        return sum(parameter.numel() for parameter in model.parameters())
    whole = argparse.Namespace(**(vars(args) | _ONE_PROCESS))
    return int(sum(stage.total for stage in stage_parameters(whole)))


def checkpoint_bytes(args: argparse.Namespace) -> int:
    """Size of one checkpoint: weights, and master weights with two Adam moments in fp32.

    With FSDP2 the weights are the master weights. With `--lora-rank` it holds factors only.
    """
    weight = 2 if (args.bf16 or args.fp16) and not args.use_torch_fsdp2 else 4
    optimizer = 0 if args.no_save_optim else (12 if args.optimizer == "adam" else 8)
    if args.use_torch_fsdp2:
        optimizer = max(0, optimizer - 4)
    if args.lora is not None:
        targets = chosen_targets(args.hf_config, args.lora)
        return trained_parameters(targets.values()) * (4 + optimizer)
    return count_parameters(args) * (weight + optimizer)


def shown_bytes(count: int) -> str:
    """A size in GiB, or MiB below one, rounded to a tenth."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
