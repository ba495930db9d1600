"""What watches over a run: documents stay apart, losses stay finite."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from post_training.datasets import SplitDocuments, packs_of
from post_training.isolation_check import ForwardStep, check_isolation
from post_training.nonfinite import guard
from post_training.platform.training_hooks import hooks
from post_training.run_log import RunLog


def install_safeguards(
    args: argparse.Namespace,
    forward_step: ForwardStep,
    tokenizer: Any,
    documents: Mapping[str, SplitDocuments],
    run_log: RunLog,
) -> None:
    """Register with the training hooks; call it when arguments are validated.

    Args:
        args: validated arguments.
        forward_step: the run's own.
        tokenizer: the HuggingFace tokenizer.
        documents: prepared documents by split.
        run_log: shows what was found, and times steps without it.
    """
    if args.skip_train:
        return
    hooks.on_train_start.append(
        functools.partial(
            check_isolation, forward_step=forward_step, args=args, say=run_log.progress.message
        )
    )
    hooks.on_train_start.append(run_log.start_clock)
    plan: dict[str, Any] = {
        "num_packed_samples": args.train_iters * args.global_batch_size,
        "epochs": args.num_epochs,
        "global_batch_size": args.global_batch_size,
    }
    # Off by flag, and with fp16's dynamic loss scaling, which skips such steps.
    if args.check_for_nan_in_loss_and_grad:
        guard.start(args, lambda: packs_of(documents["train"], tokenizer, args, "train", **plan))
        hooks.on_gradient_norm.append(guard.check)
        args.check_for_nan_in_loss_and_grad = False  # the one of Megatron's
