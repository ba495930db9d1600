"""Flags of steps: how many, how often, how the learning rate goes over them, what each computes again.

Megatron looks at most of them only once all processes have started, and then without a word of which flag
it was (`OptimizerParamScheduler.__init__` in `megatron/core/optimizer_param_scheduler.py`).
"""

from __future__ import annotations

import argparse

from post_training.errors import SetupError

_INTERVALS = ("log_interval", "tensorboard_log_interval", "save_interval", "eval_interval")


def check_step_flags(args: argparse.Namespace) -> None:
    """Check what can be checked before the data are known; `check_learning_rate` has the rest.

    Raises:
        SetupError: naming the flag.
    """
    for name in _INTERVALS:
        if getattr(args, name) < 1:
            raise SetupError(f"{_flag(name)} {getattr(args, name)}: must be at least 1")
    keep, every = args.save_retain_interval, args.save_interval
    if keep is not None and (keep < 1 or keep % every):
        raise SetupError(
            f"--save-retain-interval {keep}: must be a multiple of --save-interval, which is {every}"
        )
    if args.skip_train:
        return
    for name in ("train_iters", "num_epochs"):
        count = getattr(args, name)
        if count is not None and count < 0:
            raise SetupError(f"{_flag(name)} {count}: must be at least 1")
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
    if fraction is not None:
        if args.lr_warmup_iters:
            raise SetupError("give either --lr-warmup-fraction or --lr-warmup-iters")
        if not 0 <= fraction < 1:
            raise SetupError(f"--lr-warmup-fraction {fraction}: must be at least 0 and below 1")
    if args.lr_warmup_iters < 0:
        raise SetupError(f"--lr-warmup-iters {args.lr_warmup_iters}: must be at least 0")
    if args.lr_decay_iters is not None and args.lr_decay_iters < 1:
        raise SetupError(f"--lr-decay-iters {args.lr_decay_iters}: must be at least 1")
    wsd = args.lr_wsd_decay_iters
    if args.lr_decay_style == "WSD" and (wsd is None or wsd < 1):
        found = "" if wsd is None else f", not {wsd}"
        raise SetupError(
            f"--lr-decay-style WSD: --lr-wsd-decay-iters says over how many steps at the end the learning "
            f"rate falls; give it, at least 1{found}"
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


def _check_weight_decay(args: argparse.Namespace) -> None:
    first, last = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        if args.weight_decay < 0:
            raise SetupError(f"--weight-decay {args.weight_decay}: must be at least 0")
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(args, name) is not None:
                raise SetupError(
                    f"{_flag(name)}: weight decay is constant; add --weight-decay-incr-style linear or "
                    f"cosine, or leave it out"
                )
    elif first is None or last is None or not 0 <= first <= last:
        raise SetupError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style}: goes from --start-weight-decay up "
            f"to --end-weight-decay, which are {first} and {last}"
        )


def check_recomputation(args: argparse.Namespace) -> None:
    """Refuse what Megatron would meet only in the first step, if at all.

    Raises:
        SetupError: naming the flag.
    """
    for what in ("embedding", "loss"):
        if getattr(args, f"account_for_{what}_in_pipeline_split"):
            raise SetupError(
                f"--account-for-{what}-in-pipeline-split: give --decoder-first-pipeline-num-layers, "
                f"--decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout in its place"
            )
    count = args.recompute_num_layers
    if count is not None and count < 1:
        raise SetupError(f"--recompute-num-layers {count}: must be at least 1")
    if args.transformer_impl == "transformer_engine":
        return
    if "layernorm" in (args.recompute_modules or ()):
        raise SetupError(
            "--recompute-modules layernorm needs Transformer Engine; core_attn, mlp and moe work without, "
            "or --recompute-granularity full"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
