"""Refuses parallel layouts that cannot work, before any process group starts."""

from __future__ import annotations

import argparse
import math

from post_training.errors import SetupError


def padded_vocabulary(size: int, args: argparse.Namespace) -> int:
    """Rows of the embedding: `size` padded so that the tensor parallel group divides it.

    Padding goes to a multiple of `--make-vocab-size-divisible-by` (128), so that the padded size, and
    with it a checkpoint, does not depend on the tensor parallel size. Padded rows have no part in the
    softmax (`post_training/loss.py`).
    """
    tp = args.tensor_model_parallel_size
    multiple = math.lcm(args.make_vocab_size_divisible_by, tp)
    return -(-size // multiple) * multiple


def _divisors(number: int, limit: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def check(args: argparse.Namespace) -> None:
    """Check heads, layers, experts, batch and world size against the parallel sizes.

    Raises:
        SetupError: naming the flag, what was found, and values that would work.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    world = args.world_size
    if world % (tp * pp * cp):
        raise SetupError(
            f"{world} processes cannot be divided by tensor {tp} x pipeline {pp} x context {cp} = "
            f"{tp * pp * cp} parallel: start a multiple of {tp * pp * cp} processes "
            f"(torchrun --nproc-per-node) or lower a parallel size"
        )
    dp = world // (tp * pp * cp)
    heads, groups = args.num_attention_heads, args.num_query_groups
    for what, number in (("attention heads", heads), ("key/value heads", groups)):
        if number and number % tp:
            raise SetupError(
                f"--tensor-model-parallel-size {tp}: the model's {number} {what} cannot be divided by "
                f"it; sizes that work: {_divisors(math.gcd(heads, groups or heads), 64)}"
            )
    if args.ffn_hidden_size and args.ffn_hidden_size % tp:
        raise SetupError(
            f"--tensor-model-parallel-size {tp}: the model's feed-forward size {args.ffn_hidden_size} "
            f"cannot be divided by it"
        )
    layers = args.num_layers
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
    )
    if layers and layers % pp and all(option is None for option in uneven):
        raise SetupError(
            f"--pipeline-model-parallel-size {pp}: the model's {layers} layers cannot be divided by it; "
            f"sizes that work: {_divisors(layers, 64)} (or give --decoder-first-pipeline-num-layers "
            f"or --decoder-last-pipeline-num-layers)"
        )
    if ep > 1 and not args.num_experts:
        raise SetupError(f"--expert-model-parallel-size {ep}: the model has no experts")
    if ep > 1 and args.num_experts % ep:
        raise SetupError(
            f"--expert-model-parallel-size {ep}: the model's {args.num_experts} experts cannot be "
            f"divided by it; sizes that work: {_divisors(args.num_experts, 256)}"
        )
    expert_tp = args.expert_tensor_parallel_size or tp
    if args.num_experts and world % (expert_tp * ep * pp):
        raise SetupError(
            f"{world} processes cannot be divided by expert tensor {expert_tp} x expert {ep} x pipeline "
            f"{pp} = {expert_tp * ep * pp} parallel: start a multiple of {expert_tp * ep * pp} processes "
            f"or lower a parallel size"
        )
    _check_batch(args, dp)
    _check_sequence(args)


def _check_sequence(args: argparse.Namespace) -> None:
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    spread = tp if args.sequence_parallel else 1
    # A context parallel rank holds two chunks of every pack, spread over its tensor parallel group.
    multiple = spread if cp == 1 else cp * math.lcm(2, spread)
    if args.seq_length % multiple:
        flags = [f"--context-parallel-size {cp}"] if cp > 1 else []
        flags += [f"--sequence-parallel with tensor parallel size {tp}"] if spread > 1 else []
        raise SetupError(
            f"--seq-length {args.seq_length}: {' and '.join(flags)} cannot divide it evenly; use "
            f"{-(-args.seq_length // multiple) * multiple} or another multiple of {multiple}"
        )
    if cp > 1 and (args.hybrid_context_parallel or args.hierarchical_context_parallel_sizes):
        raise SetupError(
            "--hybrid-context-parallel and --hierarchical-context-parallel-sizes are not supported: "
            "--context-parallel-size alone gathers keys and values from the whole group"
        )
    if cp > 1 and args.cp_comm_type not in ("all_gather", ["all_gather"]):
        raise SetupError(
            f"--cp-comm-type {args.cp_comm_type}: only all_gather is supported; leave the flag out"
        )


def _check_batch(args: argparse.Namespace, dp: int) -> None:
    micro = args.micro_batch_size
    if micro < 1:
        raise SetupError(f"--micro-batch-size {micro}: must be at least 1")
    if args.global_batch_size is None:
        args.global_batch_size = micro * dp
    for batch_flag, batch, micro_flag, one in (
        ("--global-batch-size", args.global_batch_size, "--micro-batch-size", micro),
        (
            "--eval-global-batch-size",
            args.eval_global_batch_size or args.global_batch_size,
            "--eval-micro-batch-size",
            args.eval_micro_batch_size or micro,
        ),
    ):
        if batch < 1 or batch % (one * dp):
            nearest = max(1, round(batch / (one * dp))) * one * dp
            raise SetupError(
                f"{batch_flag} {batch}: cannot be divided by {micro_flag} {one} x {dp} data parallel "
                f"processes = {one * dp}; the nearest size that works is {nearest}"
            )
