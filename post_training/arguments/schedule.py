"""Flags of steps: how many, how often, how the learning rate goes over them, what each computes again.

Megatron looks at most of them only once all processes have started, and then without a word of which flag
it was (`OptimizerParamScheduler.__init__` in `megatron/core/optimizer_param_scheduler.py`).
"""

from __future__ import annotations

import argparse

from post_training.arguments.ranges import NEVER
from post_training.errors import SetupError


def check_step_flags(args: argparse.Namespace) -> None:
    """Check what can be checked before the data are known; `check_learning_rate` has the rest.

    Each alone is in its range already (`ranges.py`).

    Raises:
        SetupError: naming the flag.
    """
    keep, every = args.save_retain_interval, args.save_interval
    if keep is not None and keep % every:
        shown = "off" if every == NEVER else every
        raise SetupError(
            f"--save-retain-interval {keep}: must be a multiple of --save-interval, which is {shown}"
        )
    if args.profile and args.profile_step_end <= args.profile_step_start:
        raise SetupError(
            f"--profile-step-end {args.profile_step_end}: must be above --profile-step-start, which is "
            f"{args.profile_step_start}"
        )
    if args.skip_train:
        return
    _check_loss_scale(args)
    _check_weight_decay(args)
    check_learning_rate(args)


def check_learning_rate(args: argparse.Namespace) -> None:
    """Check that the learning rate can go as the flags say; once more when `--num-epochs` is steps.

    Args:
        args: whose `train_iters` is None or 0 as long as `--num-epochs` is not resolved.

    Raises:
        SetupError: naming the flag.
    """
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(args, name)
        if not 0 <= value <= args.lr:
            raise SetupError(
                f"{_flag(name)} {value}: must be between 0 and --lr, which is {args.lr}"
            )
    fraction = args.lr_warmup_fraction
    if fraction is not None and args.lr_warmup_iters:
        raise SetupError("give either --lr-warmup-fraction or --lr-warmup-iters")
    wsd = args.lr_wsd_decay_iters
    if args.lr_decay_style == "WSD" and wsd is None:
        raise SetupError(
            "--lr-decay-style WSD: --lr-wsd-decay-iters says over how many steps at the end the learning "
            "rate falls; give it, at least 1"
        )
    decay, source = args.lr_decay_iters, "--lr-decay-iters"
    if decay is None:
        decay = args.train_iters
        source = f"--num-epochs {args.num_epochs}" if args.num_epochs else "--train-iters"
    if not decay:
        return
    warm_up = args.lr_warmup_iters
    if warm_up >= decay:
        raise SetupError(
            f"--lr-warmup-iters {warm_up}: warm-up must end before the learning rate's decay does, at step "
            f"{decay} ({source}); use fewer than {decay}"
        )
    if fraction is not None:
        warm_up = fraction * decay
    if args.lr_decay_style == "WSD" and wsd > decay - warm_up:
        raise SetupError(
            f"--lr-wsd-decay-iters {wsd}: begins within the warm-up; of {decay} steps ({source}) warm-up "
            f"leaves {int(decay - warm_up)}"
        )


def _check_loss_scale(args: argparse.Namespace) -> None:
    if args.fp16 and args.bf16:
        raise SetupError("give either --fp16 or --bf16")
    if args.loss_scale is not None and not (args.fp16 or args.bf16):
        raise SetupError(f"--loss-scale {args.loss_scale}: does nothing in fp32; leave it out")
    if args.fp16 and args.min_loss_scale > args.initial_loss_scale:
        raise SetupError(
            f"--min-loss-scale {args.min_loss_scale}: must be at most --initial-loss-scale, which is "
            f"{args.initial_loss_scale}"
        )


def _check_weight_decay(args: argparse.Namespace) -> None:
    first, last = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(args, name) is not None:
                raise SetupError(
                    f"{_flag(name)}: weight decay is constant; add --weight-decay-incr-style linear or "
                    f"cosine, or leave it out"
                )
    elif first is None or last is None or first > last:
        raise SetupError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style}: goes from --start-weight-decay up "
            f"to --end-weight-decay, which are {first} and {last}"
        )


def complete_recomputation(args: argparse.Namespace) -> None:
    """Let `--recompute-granularity full` stand alone: each layer is recomputed from its input.

    What Megatron would meet only in the first step, if at all, is refused.

    Raises:
        SetupError: naming the flag.
    """
    for what in ("embedding", "loss"):
        if getattr(args, f"account_for_{what}_in_pipeline_split"):
            raise SetupError(
                f"--account-for-{what}-in-pipeline-split: give --decoder-first-pipeline-num-layers, "
                f"--decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout in its place"
            )
    if args.recompute_granularity == "full":
        if args.recompute_method is None:
            args.recompute_method = "uniform"
            args.derived.append("recompute_method")
        if args.recompute_num_layers is None:
            if args.recompute_method == "block":
                raise SetupError(
                    "--recompute-method block: --recompute-num-layers says how many layers of each "
                    "pipeline stage are recomputed; give it, or leave both out to recompute every layer"
                )
            args.recompute_num_layers = 1
            args.derived.append("recompute_num_layers")
    else:
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(args, name) is not None:
                raise SetupError(
                    f"{_flag(name)} {getattr(args, name)}: does nothing without --recompute-granularity "
                    f"full; add it, or leave this out"
                )
    modules = args.recompute_modules
    for name in ("layernorm", "mla_up_proj"):
        if name in (modules or ()) and args.transformer_impl == "local":
            raise SetupError(
                f"--recompute-modules {name} needs Transformer Engine; core_attn, mlp and moe work "
                f"without, or --recompute-granularity full"
            )
    if modules and not (args.recompute_granularity == "selective" or args.recompute_activations):
        raise SetupError(
            f"--recompute-modules {' '.join(modules)}: does nothing without --recompute-granularity "
            f"selective; add it, or leave this out"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
