"""Refuses parallel layouts that cannot work, before any process group starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from post_training.errors import SetupError
from post_training.files import config_of_run
from post_training.layout import fsdp, hybrid
from post_training.layout.candidates import Candidate, candidates, describe_changes, nearest
from post_training.layout.pipeline import (
    check_layers,
    check_virtual_stages,
    divisors,
    virtual_stages,
)


def padded_vocabulary(size: int, args: argparse.Namespace) -> int:
    """Rows of the embedding: `size` padded so that the tensor parallel group divides it.

    Padding goes to a multiple of `--make-vocab-size-divisible-by` (128), so that the padded size, and
    with it a checkpoint, does not depend on the tensor parallel size. Padded rows have no part in the
    softmax (`post_training/training/loss.py`).
    """
    tp = args.tensor_model_parallel_size
    multiple = math.lcm(args.make_vocab_size_divisible_by, tp)
    return -(-size // multiple) * multiple


def check(args: argparse.Namespace) -> None:
    """Check heads, layers, experts, batch and world size against the parallel sizes.

    Raises:
        SetupError: naming the flag, what was found, values that would work, and the nearest whole layout
            that passes every rule.
    """
    for rule in FLAG_RULES:
        rule(args)
    try:
        for rule in RULES:
            rule(args)
    except SetupError as error:
        changes = nearest(args, layouts(args), _numbers_of_the_run(args))
        if changes is None:
            raise
        raise SetupError(f"{error}; {describe_changes(args, changes)}") from None


def layouts(args: argparse.Namespace) -> Iterator[Candidate]:
    """The layouts of this number of processes that pass every rule, the nearest sizes first."""
    rules, kept = (*FLAG_RULES, *RULES), _numbers_of_the_run(args)
    return candidates(args, rules, batch_multiple, sequence_multiple, kept)


def _numbers_of_the_run(args: argparse.Namespace) -> dict[str, int]:
    """What a run that has begun in this output folder can only go on with (`checkpoint/position.py`)."""
    if (
        args.skip_train
        or not (Path(args.save or "") / "latest_checkpointed_iteration.txt").is_file()
    ):
        return {}
    written = config_of_run(Path(args.output_dir or ""))
    names = ("global_batch_size", "seq_length")
    return {name: written[name] for name in names if isinstance(written.get(name), int)}


def data_parallel_size(args: argparse.Namespace) -> int:
    """Processes that read different data; the sizes must divide the number of processes."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return int(args.world_size // (tp * pp * args.context_parallel_size))


def describe_layout(args: argparse.Namespace) -> str:
    """One line: how the processes share the model, and what a step is."""
    cuts = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "FSDP2" if args.use_torch_fsdp2 else "data": data_parallel_size(args),
    }
    if (args.expert_model_parallel_size or 1) > 1:
        cuts["experts (within these)"] = args.expert_model_parallel_size
    shown = " x ".join(f"{name} {size}" for name, size in cuts.items() if size > 1) or "one"
    micro = args.micro_batch_size * data_parallel_size(args)
    return (
        f"layout: {args.world_size} processes = {shown}; a step is {args.global_batch_size} packs of "
        f"{args.seq_length} tokens in {args.global_batch_size // micro} micro batches"
    )


def batch_multiple(args: argparse.Namespace) -> int:
    """A number of packs whose every multiple is a global batch that works, evaluation included.

    It is the default of `--global-batch-size` too: one micro batch for every rank, in the usual case.
    """
    packs = args.micro_batch_size * data_parallel_size(args)
    if not args.eval_global_batch_size:
        evaluated = args.eval_micro_batch_size or args.micro_batch_size
        packs = math.lcm(packs, evaluated * data_parallel_size(args))
    return packs * _interleaved_group(args)


def sequence_multiple(args: argparse.Namespace) -> int:
    """What must divide `--seq-length`."""
    spread = int(args.tensor_model_parallel_size) if args.sequence_parallel else 1
    cp = int(args.context_parallel_size)
    # A context parallel rank holds two chunks of every pack, spread over its tensor parallel group.
    return spread if cp == 1 else cp * math.lcm(2, spread)


def _interleaved_group(args: argparse.Namespace) -> int:
    """Micro batches that a virtual stage takes in a row (Megatron's default: one a pipeline rank)."""
    if virtual_stages(args) == 1:
        return 1
    return int(args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size)


def _check_processes(args: argparse.Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, world = args.context_parallel_size, args.world_size
    for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
        size = getattr(args, f"{name}_parallel_size")
        if size < 1:
            raise SetupError(f"--{name.replace('_', '-')}-parallel-size {size}: must be at least 1")
    if world % (tp * pp * cp):
        raise SetupError(
            f"{world} processes cannot be divided by tensor {tp} x pipeline {pp} x context {cp} = "
            f"{tp * pp * cp} parallel: start a multiple of {tp * pp * cp} processes "
            f"(torchrun --nproc-per-node) or lower a parallel size"
        )


def _check_heads(args: argparse.Namespace) -> None:
    tp = args.tensor_model_parallel_size
    heads = args.num_attention_heads
    # Without groups the number of them says nothing: each head has a key of its own.
    groups = args.num_query_groups if args.group_query_attention else heads
    for what, number in (("attention heads", heads), ("key/value heads", groups)):
        if number and number % tp:
            raise SetupError(
                f"--tensor-model-parallel-size {tp}: the model's {number} {what} cannot be divided by "
                f"it; sizes that work: {divisors(math.gcd(heads, groups or heads), 64)}"
            )
    if args.multi_latent_attention:
        latent = args.kv_lora_rank + args.qk_pos_emb_head_dim
        for what, number in (("queries", args.q_lora_rank or 0), ("keys and values", latent)):
            if number % tp:
                raise SetupError(
                    f"--tensor-model-parallel-size {tp}: the latent vector of {what} has {number} "
                    f"elements, which cannot be divided by it; sizes that work: {divisors(number, 64)}"
                )
    pattern, letters = args.moe_layer_freq, args.hybrid_layer_pattern
    all_experts = args.num_experts and (
        "-" not in letters
        if letters is not None
        else pattern == 1 or (isinstance(pattern, list) and all(pattern))
    )
    if args.ffn_hidden_size and args.ffn_hidden_size % tp and not all_experts:
        raise SetupError(
            f"--tensor-model-parallel-size {tp}: the model's feed-forward size {args.ffn_hidden_size} "
            f"cannot be divided by it"
        )
    if (shared := args.moe_shared_expert_intermediate_size or 0) % tp:
        raise SetupError(
            f"--tensor-model-parallel-size {tp}: the shared experts' feed-forward size {shared} cannot be "
            f"divided by it"
        )


def _check_experts(args: argparse.Namespace) -> None:
    ep, experts, world = args.expert_model_parallel_size, args.num_experts, args.world_size
    if ep > 1 and not experts:
        raise SetupError(f"--expert-model-parallel-size {ep}: the model has no experts")
    if (args.expert_tensor_parallel_size or 1) > 1 and not experts:
        raise SetupError(
            f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size}: the model has no experts"
        )
    if not experts:
        return
    if experts % ep:
        raise SetupError(
            f"--expert-model-parallel-size {ep}: the model's {experts} experts cannot be "
            f"divided by it; sizes that work: {divisors(experts, 256)}"
        )
    pp = args.pipeline_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if world % (expert_tp * ep * pp):
        raise SetupError(
            f"{world} processes cannot be divided by expert tensor {expert_tp} x expert {ep} x pipeline "
            f"{pp} = {expert_tp * ep * pp} parallel: start a multiple of {expert_tp * ep * pp} processes "
            f"or lower a parallel size"
        )
    if args.add_bias_linear and expert_tp > 1:
        raise SetupError(
            f"--expert-tensor-parallel-size {expert_tp} (by default the tensor parallel size): experts "
            f"with biases are whole on a rank; use 1"
        )
    if args.moe_ffn_hidden_size and args.moe_ffn_hidden_size % expert_tp:
        raise SetupError(
            f"--expert-tensor-parallel-size {expert_tp} (by default the tensor parallel size): the "
            f"experts' feed-forward size {args.moe_ffn_hidden_size} cannot be divided by it"
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise SetupError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: a model with experts needs "
            f"--sequence-parallel with it"
        )


def _check_batch(args: argparse.Namespace) -> None:
    dp, pp = data_parallel_size(args), args.pipeline_model_parallel_size
    micro = args.micro_batch_size
    if micro < 1:
        raise SetupError(f"--micro-batch-size {micro}: must be at least 1")
    chunks, group = virtual_stages(args), _interleaved_group(args)
    if chunks > 1 and group < pp:
        raise SetupError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group}: must be at least the pipeline "
            f"parallel size {pp}"
        )
    training = args.global_batch_size or batch_multiple(args)
    for batch_flag, batch, micro_flag, one in (
        ("--global-batch-size", training, "--micro-batch-size", micro),
        (
            "--eval-global-batch-size",
            args.eval_global_batch_size or training,
            "--eval-micro-batch-size",
            args.eval_micro_batch_size or micro,
        ),
    ):
        if batch < 1 or batch % (one * dp):
            raise SetupError(
                f"{batch_flag} {batch}: cannot be divided by {micro_flag} {one} x {dp} data parallel "
                f"processes = {one * dp}"
            )
        micro_batches = batch // (one * dp)
        # Megatron's interleaved schedule: the last group may be smaller, but fills the pipeline.
        if chunks > 1 and (micro_batches < group or 0 < micro_batches % group < pp):
            raise SetupError(
                f"{batch_flag} {batch}: {micro_batches} micro batches of {one} on {dp} data parallel "
                f"processes; virtual pipeline stages take them in groups of {group}"
            )


def _check_sequence(args: argparse.Namespace) -> None:
    tp, cp, multiple = (
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        sequence_multiple(args),
    )
    if args.seq_length % multiple:
        flags = [f"--context-parallel-size {cp}"] if cp > 1 else []
        if args.sequence_parallel and tp > 1:
            flags.append(f"--sequence-parallel with tensor parallel size {tp}")
        raise SetupError(
            f"--seq-length {args.seq_length}: {' and '.join(flags)} cannot divide it evenly; use "
            f"{-(-args.seq_length // multiple) * multiple} or another multiple of {multiple}"
        )


def _check_context_flags(args: argparse.Namespace) -> None:
    if args.cp_comm_type not in ("all_gather", ["all_gather"]):
        raise SetupError(
            f"--cp-comm-type {args.cp_comm_type}: only all_gather is supported; leave the flag out"
        )


# Each raises a `SetupError` where the arguments break it. The search for a layout that works runs the
# same rules, so that what it proposes passes them. Later rules may rely on earlier ones.
RULES = (
    fsdp.check_sizes,
    hybrid.check_sizes,
    _check_processes,
    _check_heads,
    check_layers,
    check_virtual_stages,
    _check_experts,
    _check_batch,
    _check_sequence,
)
# Another layout is no answer to what these refuse.
FLAG_RULES = (_check_context_flags, fsdp.check_flags)


def overlap(args: argparse.Namespace) -> dict[str, bool]:
    """The flags of overlap as they hold for this layout.

    A derived one is off where there is no data parallelism, and where no test compares it.
    `--overlap-param-gather` needs the other flag and the distributed optimizer; a file may turn either off.
    """
    others = (args.num_experts, args.draft, args.export_kd_teacher_load, args.export_quant_cfg)
    on = not any(others) and data_parallel_size(args) > 1 and not args.eval_only
    reduce, gather = args.overlap_grad_reduce, args.overlap_param_gather
    if "overlap_grad_reduce" in args.derived:
        reduce &= on
    if "overlap_param_gather" in args.derived:
        gather &= reduce and args.use_distributed_optimizer and on
    return {"overlap_grad_reduce": reduce, "overlap_param_gather": gather}
