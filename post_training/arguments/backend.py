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
        export_quant_cfg moe_router_dtype moe_input_jitter_eps moe_routing_trace_path fp8 fp4
        decoupled_lr decoupled_min_lr no_weight_decay_cond_type embedding_init_method_std
        save_tokens_per_expert_interval
        """.split(),
        (None,),
    ),
    **dict.fromkeys(
        """
        sequence_parallel export_offline_model recompute_activations moe_layer_recompute fp16
        apply_wd_to_qk_layernorm init_method_xavier_uniform fine_grained_activation_offloading
        moe_enable_routing_replay moe_per_layer_logging batch_invariant_mode use_kitchen_attention
        """.split(),
        (False,),
    ),
    "init_method_std": (0.02,),
    "mlp_chunks_for_training": (1,),
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
    if args.hf_model is None and args.task is None:
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
            model = f"--hf-model {args.hf_model}" if args.hf_model else f"--task {args.task}"
            cure = "use --bf16" if key == "fp16" else "leave it out"
            raise SetupError(
                f"--{key.replace('_', '-')}{shown}: {model} is computed by its own class of "
                f"transformers under --use-torch-fsdp2{why}, which has no such thing; {cure}"
            )


def model_backend(asked: Any, name: Any, task: Any = None) -> tuple[str, str | None]:
    """What computes a model: Megatron's layers where they can, else its own class of `transformers`.

    Only config.json is read.

    Args:
        asked: `--model-backend`; None is auto.
        name: `--hf-model`, if given.
        task: `--task`, which calls the model as `transformers` made it.

    Returns:
        `megatron` or `transformers`, and why not Megatron where that was not asked for.
    """
    if task and asked != "megatron":
        return "transformers", "--task" if isinstance(name, str) else None
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
    try:
        reason = why_not_megatron(SimpleNamespace(**named))
    except (TypeError, ValueError, AttributeError):  # values of other types than they should have
        return "megatron", None
    return ("transformers", reason.partition("; ")[0]) if reason else ("megatron", None)


def check_task(args: argparse.Namespace) -> None:
    """Refuse what a task of one's own cannot be told, or early stopping without what it looks at.

    Raises:
        SetupError: naming the flag.
    """
    if args.early_stop_patience is not None and args.early_stop_metric is None:
        raise SetupError("--early-stop-patience: name what it looks at with --early-stop-metric")
    if args.early_stop_metric is not None and not (
        args.valid_data_files or args.split_ratio or args.offline_distillation_data
    ):
        raise SetupError(
            f"--early-stop-metric {args.early_stop_metric}: there is no validation data "
            f"(--valid-data-files, or --split-ratio)"
        )
    if args.answer_tokens is not None:
        _check_answers(args)
    elif args.kind_key is not None:
        raise SetupError(
            f"--kind-key {args.kind_key} does nothing without --answer-tokens; add it, or leave this out"
        )
    if args.task is None:
        return
    if args.model_backend == "megatron":
        raise SetupError(
            f"--task {args.task}: its methods call the model of transformers; leave out "
            f"--model-backend megatron"
        )
    for key in _NOT_OF_TASKS:
        if getattr(args, key):
            raise SetupError(
                f"--{key.replace('_', '-')}: --task {args.task} reads its own rows; leave it out"
            )


def _check_answers(args: argparse.Namespace) -> None:
    """Refuse `--answer-tokens` where nothing answers, or there is nothing to be answered.

    Raises:
        SetupError: saying why.
    """
    why = None
    if args.task is not None:
        why = f"--task {args.task} says itself what is right"
    elif args.model_backend == "megatron":
        why = (
            "Megatron's layers do not answer during a run; ask its checkpoints by scripts/evaluate.py, or "
            "add --model-backend transformers"
        )
    elif not (args.valid_data_files or args.test_data_files) or args.eval_iters == 0:
        why = "no rows of --valid-data-files or --test-data-files are evaluated"
    if why is not None:
        raise SetupError(f"--answer-tokens {args.answer_tokens}: {why}")


# What is no path of `build_dataloader`.
_NOT_OF_TASKS = ("finetune_hf_dataset", "split_ratio")
