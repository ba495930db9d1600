"""The flags of LoRA, and what a run with them is refused with."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from post_training.adapters.modules import modules_of
from post_training.adapters.peft_folder import is_of, read_settings
from post_training.adapters.settings import KEYWORDS, LoraSettings, Target, chosen_targets
from post_training.errors import SetupError
from post_training.hf.folder import local_model_folder


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    add = parser.add_argument_group("LoRA").add_argument
    add(
        "--lora-rank", type=int, metavar="R", help="train factors of this rank; the model is frozen"
    )
    add("--lora-alpha", type=float, metavar="A", help="they are scaled by A / R (default: 2 R)")
    add("--lora-dropout", type=float, metavar="P", help="of what they read (default: 0)")
    add("--rslora", action="store_true", help="scale by A divided by the square root of R")
    add(
        "--lora-adapter", metavar="DIR", help="begin with this adapter of PEFT, which says the rest"
    )
    what = f"{', '.join(KEYWORDS)} (default: all), last parts of HuggingFace names, or one pattern"
    add(
        "--base-precision",
        choices=["nf4"],
        help="keep the frozen matrices in 4 bits (QLoRA; a model of transformers, under FSDP2)",
    )
    add("--lora-targets", nargs="+", metavar="NAME", help=f"matrices with factors: {what}")


# What an adapter cannot be trained with, the value that it can, and why.
_OF_MEGATRON = (
    ("base_precision", None, "Megatron's layers keep theirs; add --model-backend transformers"),
    ("fp4", None, "factors are not computed in 4 bits"),
    ("te_precision_config_file", None, "factors are not computed in 8 bits"),
    ("defer_embedding_wgrad_compute", False, "the output layer is frozen"),
    ("optimizer_cpu_offload", False, "factors and their optimizer stay on the device"),
    ("use_precision_aware_optimizer", False, "factors of fp32 are their own master copies"),
)
_ALONE = (
    ("fp8", None, "factors are not computed in 8 bits"),
    ("draft", None, "a draft's base is frozen already"),
    ("export_kd_teacher_load", None, "a taught student is trained as a whole"),
    ("offline_distillation_data", None, "a taught student is trained as a whole"),
    ("decoupled_lr", None, "factors are trained at one rate"),
    ("decoupled_min_lr", None, "factors are trained at one rate"),
)
_OF_ADAPTER = (
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "rslora",
    "lora_dropout",
    "base_precision",
)


def lora_of(args: argparse.Namespace) -> LoraSettings | None:
    """What the run's adapter is; None where it has none.

    Raises:
        SetupError: a missing or contradictory flag.
    """
    flag = "--lora-rank" if args.lora_adapter is None else "--lora-adapter"
    given = [name for name in _OF_ADAPTER if getattr(args, name) not in (None, False)]
    if args.lora_adapter is None and args.lora_rank is None:
        if given:
            raise SetupError(
                f"--{given[0].replace('_', '-')}: there is no adapter; add --lora-rank or --lora-adapter"
            )
        return None
    if args.hf_config is None or args.random_weights:
        raise SetupError(
            f"{flag}: an adapter belongs to weights: give --hf-model, no --random-weights"
        )
    theirs = args.model_backend == "transformers"
    if theirs and importlib.util.find_spec("peft") is None:
        raise SetupError(
            f"{flag}: models of transformers are trained with peft, which is not installed (pip install "
            f"'.[lora]')"
        )
    for name, allowed, why in _ALONE if theirs else _OF_MEGATRON + _ALONE:
        value = getattr(args, name, allowed)
        if value != allowed:
            name = name.replace("_", "-") + "-format" * (name in ("fp8", "fp4"))
            said = f"--{name}" + ("" if value is True else f" {value}")
            raise SetupError(f"{said}: not with {flag}: {why}")
    exact = args.use_distributed_optimizer or args.use_torch_fsdp2 or args.skip_train
    if (args.bf16 or args.fp16) and not exact:
        raise SetupError(
            f"{flag}: beside a base in 16 bits only Megatron's distributed optimizer saves factors in "
            f"fp32; use --optimizer adam with it, or --fp32"
        )
    if args.lora_adapter is None:
        alpha = 2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
        targets = _targets(args.lora_targets or ["all"])
        settings = LoraSettings(args.lora_rank, alpha, targets, args.rslora)
        settings = replace(settings, backend=args.model_backend, nf4=args.base_precision == "nf4")
    else:
        others = [name for name in given if name not in ("lora_dropout", "base_precision")]
        if others:
            raise SetupError(f"--{others[0].replace('_', '-')}: {flag} says it; leave it out")
        settings = read_settings(
            args.lora_adapter,
            args.hf_config,
            local_model_folder(args.hf_model),
            backend=args.model_backend,
            nf4=args.base_precision == "nf4",
        )
        if not is_of(args.lora_adapter, local_model_folder(args.hf_model)):
            raise SetupError(
                f"{flag} {args.lora_adapter}: was trained on other weights than those of "
                f"--hf-model {args.hf_model}"
            )
    chosen = chosen_targets(args.hf_config, settings)
    if theirs:
        _check_modules(args, chosen)
        return settings
    _check_ranks(args, chosen)
    of_experts = any(target.weight.of_expert for target in chosen.values())
    if of_experts and args.moe_grouped_gemm:
        raise SetupError(
            "--moe-grouped-gemm: --lora-targets names matrices of experts, which are computed one by one "
            "then; leave it out, or name others, such as attention"
        )
    shared = next((n for n, t in chosen.items() if ".shared_experts." in t.parameter), None)
    if args.moe_shared_expert_overlap and shared:
        raise SetupError(
            f"--moe-shared-expert-overlap: --lora-targets names {shared}, whose input is gathered apart "
            f"then; leave it out, or name others, such as attention"
        )
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if args.lora_dropout and etp > 1 and of_experts:
        raise SetupError(
            f"--lora-dropout {args.lora_dropout}: ranks of --expert-tensor-parallel-size {etp} would drop "
            f"different parts of one expert's input; use --expert-tensor-parallel-size 1"
        )
    return settings


def _check_modules(args: argparse.Namespace, chosen: Mapping[str, Target]) -> None:
    """Refuse what `peft`, or 4 bits, cannot do with parts of a model of `transformers`.

    Raises:
        SetupError: naming the part.
    """
    seeing = next((name for name, target in chosen.items() if target.kind == "vision"), None)
    if args.freeze and seeing:
        raise SetupError(
            f"--freeze {args.freeze}: --lora-targets names {seeing}; leave one of them out"
        )
    fused = next((name for name, target in chosen.items() if target.fused), None)
    if fused and args.lora_dropout:
        raise SetupError(
            f"--lora-dropout {args.lora_dropout}: the experts of {fused} are one parameter, whose input is "
            f"not dropped; leave it out, or name other matrices in --lora-targets"
        )
    for name, module in modules_of(args.hf_config).items() if args.base_precision else ():
        if module.kind in ("attention", "mlp") and not module.linear:
            raise SetupError(
                f"--base-precision {args.base_precision}: {name} is no torch.nn.Linear, and only these "
                f"are kept in 4 bits; leave it out"
            )


def _check_ranks(args: argparse.Namespace, chosen: Mapping[str, Target]) -> None:
    """Refuse what might leave a rank without factors: Megatron saves no optimizer of nothing.

    Raises:
        SetupError: a pipeline stage or a rank of experts might have none.
    """
    if args.pipeline_model_parallel_size > 1:
        layout = args.pipeline_model_parallel_layout
        stages = layout.split("|") if isinstance(layout, str) else ["t"]
        with_factors = {
            t.parameter.split(".")[2] for t in chosen.values() if ".layers." in t.parameter
        }
        without = [n for n in range(args.num_layers) if str(n) not in with_factors]
        if without or not all("t" in stage for stage in stages):
            what = f"layer {without[0]} has" if without else "a stage without layers has"
            raise SetupError(
                f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: {what} no factors; "
                f"every pipeline stage must train some; name matrices of every layer in --lora-targets"
            )
    experts = Counter(t.name.split(".")[-2] for t in chosen.values() if t.weight.of_expert)
    if args.expert_model_parallel_size > 1 and experts:
        if len(experts) < args.num_experts or len(set(experts.values())) > 1:
            raise SetupError(
                f"--expert-model-parallel-size {args.expert_model_parallel_size}: --lora-targets names "
                f"some experts only; name all or none"
            )


def _targets(words: list[str]) -> tuple[str, ...] | str:
    """Names, or one pattern.

    Raises:
        SetupError: several words with a pattern among them, or one that is none.
    """
    patterns = [word for word in words if not re.fullmatch(r"[\w.]+", word)]
    if not patterns:
        return tuple(words)
    if len(words) > 1:
        raise SetupError(f"--lora-targets {' '.join(words)}: give names, or one pattern alone")
    try:
        re.compile(patterns[0])
    except re.error as error:
        raise SetupError(f"--lora-targets {patterns[0]}: is no pattern ({error})") from error
    return patterns[0]
