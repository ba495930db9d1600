"""`--eval-only`: the validation and test losses of a model, without training it."""

from __future__ import annotations

import argparse

from post_training.errors import SetupError


def prepare_evaluation(args: argparse.Namespace) -> None:
    """Set what follows from `--eval-only`; Megatron's `--skip-train` does the rest.

    With it Megatron builds neither optimizer nor gradient buffers and loads only weights.

    Raises:
        SetupError: a flag asks for what only training can give.
    """
    if args.save_hf:
        raise SetupError("--save-hf: --eval-only changes no model; use scripts/export_hf.py")
    args.train_iters = 0
    args.num_epochs = None
    # Megatron asks for a number; 0 leaves the learning rate schedule out.
    args.no_load_optim = args.no_load_rng = True
    # Messages of gradients and of an optimizer that there is not, which overlap with nothing.
    args.overlap_grad_reduce = args.overlap_param_gather = False
    args.overlap_param_gather_with_optimizer_step = False
