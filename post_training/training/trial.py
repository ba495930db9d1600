"""Forward passes of the run's own model, layout and schedule that leave nothing behind."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from post_training.machine.device import current_device
from post_training.metrics.step_counters import counters
from post_training.platform.megatron_post_training import (
    get_tensor_shapes_adjust_fn_for_distillation,
)

ForwardStep = Callable[[Any, torch.nn.Module], tuple[Tensor, Callable[..., Any]]]


@contextmanager
def undisturbed(model: list[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards everything is as it was."""
    from megatron.training import training

    args = training.get_args()
    modes = [chunk.training for chunk in model]
    on_cuda = current_device().type == "cuda"
    host = torch.get_rng_state()
    device = torch.cuda.get_rng_state() if on_cuda else None
    tracked = get_cuda_rng_tracker().get_states()
    # With overlapped gathers the first forward pass would wait for one that nobody has started. Behind the
    # last step they are off already.
    hooked = training.should_disable_forward_pre_hook(args) and all(
        getattr(chunk, "remove_forward_pre_hook_handles", ()) for chunk in model
    )
    if hooked:
        training.disable_forward_pre_hook(model, param_sync=False)
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
        if hooked:
            training.enable_forward_pre_hook(model)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
        get_cuda_rng_tracker().set_states(tracked)
        counters.reset()


def trial_losses(
    model: list[torch.nn.Module],
    data: Any,
    count: int,
    forward_step: ForwardStep,
    args: argparse.Namespace,
) -> list[tuple[Tensor, Tensor]]:
    """Losses and groups of the trained tokens of each micro batch; empty but on the last stage.

    Args:
        model: chunks of this rank.
        data: an iterator over micro batches; a list of one a virtual stage; None where others read them.
        count: of micro batches.
        forward_step: the run's own.
        args: validated arguments.
    """
    collected: list[tuple[Tensor, Tensor]] = []

    def step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        output, loss = forward_step(iterator, chunk)
        trained = loss.args[0]  # type: ignore[attr-defined]

        def collect(losses: Tensor, non_loss_data: bool = False) -> Tensor:
            flat = losses.flatten()
            if flat.numel() != trained.indices.numel():
                flat = flat.index_select(0, trained.indices)
            real = trained.weights > 0  # not the stand-in of a part without watched tokens
            collected.append((flat[real].float(), trained.groups[real]))
            return losses

        return output, collect

    sizes: dict[str, Any] = {
        "seq_length": args.seq_length,
        "micro_batch_size": args.eval_micro_batch_size,
        "decoder_seq_length": args.seq_length,
    }
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data,
        model=model,
        num_microbatches=count,
        forward_only=True,
        collect_non_loss_data=True,
        adjust_tensor_shapes_fn=get_tensor_shapes_adjust_fn_for_distillation(model, **sizes),
        **sizes,
    )
    return collected
