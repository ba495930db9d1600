"""What computes the model: Megatron's layers, or its own class of `transformers`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from post_training.errors import SetupError
from post_training.files import json_object
from post_training.hf.families import why_not_megatron

MODEL_BACKENDS = ("auto", "megatron", "transformers")

# Flags of which another value than this makes Megatron's layers something that other models are not.
_OF_MEGATRON: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        [f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context")], (1,)
    ),
    **dict.fromkeys(("expert_model_parallel_size", "expert_tensor_parallel_size"), (None, 1)),
    **dict.fromkeys(
        """
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        pipeline_model_parallel_layout draft offline_distillation_data export_kd_teacher_load
        export_quant_cfg moe_router_dtype fp8 fp4
        """.split(),
        (None,),
    ),
    **dict.fromkeys(
        "sequence_parallel export_offline_model recompute_activations fp16".split(), (False,)
    ),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "moe_aux_loss_coeff"), (None, 0.0)),
    "recompute_granularity": (None, "full"),
    "recompute_method": (None, "uniform"),
    "recompute_num_layers": (None, 1),
    "cuda_graph_impl": ("none",),
}


def check_transformers(args: argparse.Namespace) -> None:
    """Refuse what only models of Megatron's layers can be told.

    Raises:
        SetupError: naming the flag, and why the model is not made of these.
    """
    if args.hf_model is None:
        raise SetupError("--model-backend transformers needs --hf-model")
    why = f" ({args.backend_reason})" if args.backend_reason else ""
    if not args.use_torch_fsdp2:
        raise SetupError(
            f"--model-backend transformers runs with --use-torch-fsdp2 only{why}; leave "
            f"use_torch_fsdp2 out"
        )
    for key, values in _OF_MEGATRON.items():
        value = getattr(args, key, values[0])
        if value not in values:
            shown = "" if value is True else f" {value}"
            raise SetupError(
                f"--{key.replace('_', '-')}{shown}: --hf-model {args.hf_model} is computed by its own "
                f"class of transformers under --use-torch-fsdp2{why}, which has no such thing; leave it out"
            )


def model_backend(asked: Any, name: Any) -> tuple[str, str | None]:
    """What computes a model: Megatron's layers where they can, else its own class of `transformers`.

    Only config.json is read.

    Args:
        asked: `--model-backend`; None is auto.
        name: `--hf-model`, if given.

    Returns:
        `megatron` or `transformers`, and why not Megatron where that was not asked for.
    """
    if asked in ("megatron", "transformers") or not isinstance(name, str):
        return str(asked if asked in MODEL_BACKENDS[1:] else "megatron"), None
    try:
        file = Path(name, "config.json")
        if not file.is_file() and not Path(name).is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(name, "config.json"))
        named = json_object(file)
    except (OSError, ValueError, SetupError):
        return "megatron", None  # told when the configuration is loaded
    classes = named.get("architectures")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes[:1]):
        return "megatron", None
    reason = why_not_megatron(SimpleNamespace(**named))
    return ("transformers", reason.partition("; ")[0]) if reason else ("megatron", None)
