"""`pretrain()` has no callbacks: nobody but its own log sees a step's loss or an evaluation's result.

Upstream: megatron-core 0.19.2, `training/training.py` (`training_log`, `evaluate`,
`evaluate_and_print_results`). It also evaluates the validation and the test split for the same number
of iterations, whatever their sizes; `TrainingHooks.evaluation_iterations` gives each split its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """One optimizer step as Megatron reports it, on every rank."""

    iteration: int
    losses: dict[str, torch.Tensor]
    """Means over the global batch by name; empty except on the last pipeline stage."""
    learning_rate: float | None
    grad_norm: float | None
    skipped: bool
    """The optimizer refused the step because a gradient was not finite (fp16 loss scaling)."""


@dataclass
class Evaluation:
    """One pass over a split, on every rank."""

    split: str
    """`valid` or `test`."""
    iteration: int
    losses: dict[str, torch.Tensor]
    """Token-weighted means over the split; empty except on the last pipeline stage."""


@dataclass
class TrainingHooks:
    """What to call during `pretrain()`; the one instance is `hooks`."""

    on_step: list[Callable[[Step], None]] = field(default_factory=list)
    on_evaluation_start: list[Callable[[str], None]] = field(default_factory=list)
    on_evaluation_end: list[Callable[[Evaluation], None]] = field(default_factory=list)
    evaluation_iterations: dict[str, int] = field(default_factory=dict)
    """Global batches of each split there is; a split that is not named is not evaluated."""


hooks = TrainingHooks()


def _split_of(prefix: str) -> str:
    return "test" if prefix.endswith("on test set") else "valid"


def apply() -> None:
    """Wrap the three functions so that `hooks` hears of each step and each evaluation."""
    from megatron.training import training

    training_log = training.training_log
    evaluate = training.evaluate
    evaluate_and_print_results = training.evaluate_and_print_results
    current_split = "valid"
    evaluated: set[tuple[str, int]] = set()

    @functools.wraps(training_log)
    def log_and_tell(
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = training_log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )
        step = Step(iteration, loss_dict, learning_rate, grad_norm, bool(skipped_iter))
        for tell in hooks.on_step:
            tell(step)
        return result

    @functools.wraps(evaluate)
    def evaluate_whole_split(*args: Any, **kwargs: Any) -> Any:
        kwargs["eval_iters"] = hooks.evaluation_iterations[current_split]
        result = evaluate(*args, **kwargs)
        if result[0] is not None:
            losses_of_split.append(result[0])
        return result

    losses_of_split: list[dict[str, torch.Tensor]] = []

    @functools.wraps(evaluate_and_print_results)
    def evaluate_and_tell(prefix: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal current_split
        current_split = _split_of(prefix)
        # Positional order of the original: forward_step, data iterator, model, iteration.
        iteration: int = args[3]
        # After the last step Megatron evaluates again what it may just have evaluated.
        if (
            current_split not in hooks.evaluation_iterations
            or (current_split, iteration) in evaluated
        ):
            return None
        evaluated.add((current_split, iteration))
        losses_of_split.clear()
        for tell_start in hooks.on_evaluation_start:
            tell_start(current_split)
        result = evaluate_and_print_results(prefix, *args, **kwargs)
        evaluation = Evaluation(
            current_split, iteration, losses_of_split[0] if losses_of_split else {}
        )
        for tell_end in hooks.on_evaluation_end:
            tell_end(evaluation)
        return result

    for name, replacement in (
        ("training_log", log_and_tell),
        ("evaluate", evaluate_whole_split),
        ("evaluate_and_print_results", evaluate_and_tell),
    ):
        setattr(training, name, replacement)
