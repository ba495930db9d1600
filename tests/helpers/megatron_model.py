"""Functions for `run_ranks`: a Megatron model set up as by `finetune.py`, and what is asked of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.packs import stacked


def set_up(argv: Sequence[str]) -> tuple[Any, Any]:
    """Start the process group and build this rank's part of the model.

    Returns:
        The validated arguments, and Megatron's `(model chunks, optimizer, scheduler)`.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from model_provider import model_config
    from post_training.arguments.completion import complete_run, validate
    from post_training.arguments.parser import parse_arguments
    from post_training.checkpoint import resume
    from post_training.platform.checkpoints import writer_queue

    args = parse_arguments(list(argv))
    start = resume.choose_checkpoint(args)
    complete_run(args, **start.flags())
    resume.expect(start.checkpoint)
    validate(args)
    set_global_variables(args, build_tokenizer=False)
    training.initialize_megatron()
    writer_queue.apply(args)
    container = pretrain_cfg_container_from_args(args, model_config(args, start.checkpoint))
    built = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return args, built


def flags(folder: str, output: str, *more: str) -> list[str]:
    """The least that a model can be set up with."""
    return [
        *("--hf-model", folder, "--output-dir", output, "--train-iters", "1"),
        *("--seq-length", "64", *more),
    ]


def unwrapped(built: Any) -> Any:
    """The one model chunk of this rank."""
    from megatron.core.utils import unwrap_model

    (chunk,) = built[0]
    return unwrap_model(chunk)


def exported(argv: Sequence[str]) -> dict[str, Tensor]:
    """HuggingFace tensors of the model (or checkpoint) that `argv` names; one rank."""
    from post_training.hf.weights import hf_state_dict

    args, built = set_up(argv)
    state = hf_state_dict(unwrapped(built), args.hf_config)
    return {name: value.clone() for name, value in state.items()}


def exported_from_run(output_dir: str) -> dict[str, Tensor]:
    """HuggingFace tensors of a run's newest checkpoint, read as the tools read it; one rank."""
    from model_provider import model_config
    from post_training.hf.weights import hf_state_dict
    from post_training.inference.load import load_model

    loaded = load_model(model_config, output_dir=output_dir)
    if loaded.args.model_backend == "transformers":
        from tests.helpers.reference import saved_tensors

        return saved_tensors(loaded.model.model)
    return hf_state_dict(loaded.model, loaded.args.hf_config)


def logits(argv: Sequence[str], ids: Tensor) -> Tensor:
    """Logits of one document, without packing: [tokens, vocabulary with padding]; one rank."""
    _, built = set_up(argv)
    model = unwrapped(built).eval()
    positions = torch.arange(len(ids)).unsqueeze(0)
    with torch.no_grad():
        result: Tensor = model(ids.unsqueeze(0), positions, None)
    return result[0]


def token_losses(argv: Sequence[str], packs: list[dict[str, Tensor]]) -> list[Tensor] | None:
    """Losses of the trained tokens of each micro batch (all fields [micro batch, seq_length]).

    Goes through `finetune.forward_step` and Megatron's own pipeline schedule, on any layout.

    Returns:
        On the last pipeline stage one tensor a micro batch, else None.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import finetune

    args, built = set_up(argv)
    for chunk in built[0]:
        chunk.train()
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    collected = []

    def step(iterator: Any, model: Any) -> Any:
        output, _ = finetune.forward_step(iterator, model)

        def collect(losses: Tensor, non_loss_data: bool = False) -> Tensor:
            collected.append(losses.detach().clone())
            return losses

        return output, collect

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(packs) if reads else None,
        model=built[0],
        num_microbatches=len(packs),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    return [_of_whole_row(*pair) for pair in zip(collected, packs, strict=True)]


def _of_whole_row(losses: Tensor, pack: dict[str, Tensor]) -> Tensor:
    """Losses of all trained tokens of a row, from those of each context parallel rank's part."""
    from megatron.core import parallel_state

    from post_training.batch.assemble import shift_labels
    from post_training.batch.context_parallel import ContextParallelCut
    from post_training.batch.packed_documents import row_lengths

    lengths = row_lengths(pack["document_lengths"])
    _, mask = shift_labels(pack["input_ids"].flatten(), pack["loss_mask"].flatten(), lengths)
    group = parallel_state.get_context_parallel_group()
    bounds = [0, *itertools.accumulate(lengths)]
    local = ContextParallelCut.make(bounds, size=group.size(), rank=group.rank()).local_indices
    row = torch.zeros(len(mask))
    row[local[mask[local].bool()]] = losses
    torch.distributed.all_reduce(row, group=group)
    return row[mask.bool()]


def rank() -> int:
    """Rank of this process."""
    return int(os.environ["RANK"])


def exported_and_logits(argv: Sequence[str], ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """`exported` and `logits` of one set-up model."""
    from post_training.hf.weights import hf_state_dict

    args, built = set_up(argv)
    model = unwrapped(built).eval()
    with torch.no_grad():
        found: Tensor = model(ids.unsqueeze(0), torch.arange(len(ids)).unsqueeze(0), None)
    state = hf_state_dict(model, args.hf_config)
    return {name: value.clone() for name, value in state.items()}, found[0]


def save(argv: Sequence[str]) -> None:
    """Write a checkpoint of the freshly set up model, on any layout."""
    args, (chunks, _, _) = set_up(argv)
    save_weights(args, chunks)


def save_weights(args: Any, chunks: list[Any], iteration: int = 1) -> None:
    """Write a complete checkpoint without an optimizer, on all ranks."""
    from megatron.training.checkpointing import save_checkpoint

    from post_training.checkpoint import store

    args.no_save_optim = True
    save_checkpoint(iteration, chunks, None, None, 0)
    if rank() == 0:
        store.finish_save(args.save, iteration, {})


def expert_totals(argv: Sequence[str], packs: list[dict[str, Tensor]]) -> Any:
    """What the routers did in one forward and backward pass over packs (each field [seq_length]).

    The packs are dealt out to the data parallel ranks in turn, as the sampler does.

    Returns:
        `ExpertTotals` over all ranks, the same on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import finetune
    from post_training.metrics.step_counters import counters

    args, built = set_up(argv)
    counters.watch_experts(args.num_layers, args.num_experts)
    rank, ranks = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    own, micro = packs[rank::ranks], args.micro_batch_size
    batches = [stacked(own[i : i + micro]) for i in range(0, len(own), micro)]
    for chunk in built[0]:
        chunk.train()
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    iterators = [iter(batches) if reads else None for _ in built[0]]
    get_forward_backward_func()(
        forward_step_func=finetune.forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=built[0],
        num_microbatches=len(batches),
        seq_length=args.seq_length,
        micro_batch_size=micro,
        decoder_seq_length=args.seq_length,
        forward_only=False,
    )
    return counters.reduce("cpu").experts
