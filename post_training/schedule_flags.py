"""Flags of how a step is carried out: activations computed again, messages overlapped, layers spread."""

from __future__ import annotations

import argparse

from post_training.errors import SetupError


def check_schedule_flags(args: argparse.Namespace) -> None:
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
