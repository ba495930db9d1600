"""What models with state-space layers do not go with."""

from __future__ import annotations

import argparse
import importlib.util
import math

from post_training.errors import SetupError
from post_training.machine.device import device_type

_WITHOUT = {
    "num_layers_per_virtual_pipeline_stage": "a stage is one piece of the model",
    "num_virtual_stages_per_pipeline_rank": "a stage is one piece of the model",
    "pipeline_model_parallel_layout": "stages hold equal numbers of layers",
    "decoder_first_pipeline_num_layers": "stages hold equal numbers of layers",
    "decoder_last_pipeline_num_layers": "stages hold equal numbers of layers",
    "lora_rank": "its layers in Megatron take no factors, in --model-backend transformers they do",
    "lora_adapter": "its layers in Megatron take no factors, in --model-backend transformers they do",
    "draft": "drafts stand beside models of attention layers only",
    "export_offline_model": "drafts stand beside models of attention layers only",
    "export_quant_cfg": "state-space layers are not quantised",
    "export_kd_teacher_load": "it has not been compared with a teacher",
}


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that a model with state-space layers does not go with.

    Raises:
        SetupError: naming the flag, and what goes instead.
    """
    if args.hybrid_layer_pattern is None:
        return
    cure = "leave it out, or add --model-backend transformers"
    model = f"a model with state-space layers ({args.hybrid_layer_pattern})"
    for name, why in _WITHOUT.items():
        if (value := getattr(args, name)) not in (None, False):
            raise SetupError(f"--{name.replace('_', '-')} {value}: {model}: {why}; leave it out")
    if args.use_torch_fsdp2:
        raise SetupError(
            f"--use-torch-fsdp2: {model} is not cut by it in Megatron's layers; {cure}"
        )
    if device_type() == "cuda" and importlib.util.find_spec("mamba_ssm") is None:
        raise SetupError(
            f"{model} needs the package mamba-ssm on a GPU, which is not installed; install it, or add "
            f"--model-backend transformers"
        )


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse parallel sizes that do not divide a model with state-space layers.

    Raises:
        SetupError: naming the size.
    """
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    if (cp := args.context_parallel_size) > 1:
        raise SetupError(
            f"--context-parallel-size {cp}: a state runs through all tokens of a document, which lie on "
            f"several ranks then; use tensor or pipeline parallelism"
        )
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    both = math.gcd(args.mamba_num_heads, args.mamba_num_groups)
    if both % tp:
        raise SetupError(
            f"--tensor-model-parallel-size {tp}: the model's {args.mamba_num_groups} groups of state-space "
            f"heads cannot be divided by it"
        )
    if len(pattern) % pp:
        raise SetupError(
            f"--pipeline-model-parallel-size {pp}: the model's {len(pattern)} layers ({pattern}) cannot be "
            f"divided by it"
        )
