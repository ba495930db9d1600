"""`pretrain()` has no callbacks: nobody but its own log sees a step's loss or an evaluation's result.

Upstream: megatron-core 0.19.2, `training/training.py` (`training_log`, `evaluate`,
`evaluate_and_print_results`), and nothing runs between the end of set-up and the first step (`train`), or
between a step's gradient norm and its optimizer (`ChainedOptimizer.step`). It also evaluates the
validation and the test split for the same number of iterations, whatever their sizes;
`TrainingHooks.evaluation_iterations` gives each split its own. `dummy_train_step`, which passes over the
data of `--iterations-to-skip`, knows only the fields of Megatron's own datasets. And a step is logged after
the schedule has moved on, with the learning rate of the next one: `Step.learning_rate`, Megatron's log and
its TensorBoard get the one that the optimizer used, as in the `Trainer` of `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from post_training.platform.patches import in_place_of


@dataclass
class TrainStart:
    """Everything is loaded; the first step comes next. On every rank."""

    model: list[torch.nn.Module]
    """Chunks of this rank's model, one a virtual pipeline stage."""
    data_iterator: Any
    """Of the training data: as the datasets provider made it, or a list of one a virtual stage."""


@dataclass
class Step:
    """One optimizer step as Megatron reports it, on every rank."""

    iteration: int
    learning_rate: float | None
    """That the optimizer took the step with."""
    grad_norm: float | None
    skipped: bool
    """The optimizer refused the step because a gradient was not finite (fp16 loss scaling)."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split, on every rank."""

    split: str
    """`valid` or `test`."""
    iteration: int


@dataclass
class TrainingHooks:
    """What to call during `pretrain()`; the one instance is `hooks`."""

    on_train_start: list[Callable[[TrainStart], None]] = field(default_factory=list)
    on_gradient_norm: list[Callable[[float], None]] = field(default_factory=list)
    """Called on all ranks once a step with the global gradient norm; the optimizer has not stepped."""
    on_step: list[Callable[[Step], None]] = field(default_factory=list)
    on_save_start: list[Callable[[int], None]] = field(default_factory=list)
    on_save_end: list[Callable[[int], None]] = field(default_factory=list)
    """Called on all ranks with the iteration before and after a checkpoint is saved."""
    on_evaluation_start: list[Callable[[str], None]] = field(default_factory=list)
    on_evaluation_end: list[Callable[[Evaluation], None]] = field(default_factory=list)
    evaluation_iterations: dict[str, int] = field(default_factory=dict)
    """Global batches of each split there is; a split that is not named is not evaluated."""
    evaluates_at_start: bool = False
    """Whether the validation split is evaluated before the first step of all."""
    save_wanted: bool = False
    """Whether a checkpoint is to be saved after this step, whatever the interval; alike on all ranks."""
    end_wanted: bool = False
    """Whether training is to be saved and ended after this step; alike on all ranks."""


hooks = TrainingHooks()


def _tell[Fact](listeners: list[Callable[[Fact], None]], fact: Fact) -> None:
    for listener in listeners:
        listener(fact)


def _unwrapped(data_iterator: Any) -> Any:
    """Take off Megatron's wrapper around each iterator."""
    if isinstance(data_iterator, list):
        return [_unwrapped(each) for each in data_iterator]
    return getattr(data_iterator, "iterable", data_iterator)


def apply() -> None:
    """Wrap Megatron's functions so that `hooks` hears of each step and each evaluation."""
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
    from megatron.training import training

    current_split = "valid"
    evaluated: set[Evaluation] = set()
    rate_used: float | None = None

    @in_place_of((training, "train"))
    def tell_and_train(
        train: Any, forward: Any, model: Any, optimizer: Any, *rest: Any, **more: Any
    ) -> Any:
        if hooks.on_gradient_norm:
            # Called by the optimizer's `step`, once, on all ranks, before it clips.
            @in_place_of((optimizer, "get_grad_norm"))
            def measure_and_tell(get_grad_norm: Any) -> Any:
                norm = get_grad_norm()
                _tell(hooks.on_gradient_norm, float(norm or 0.0))
                return norm

        # Behind the optimizer: its schedule and the training data.
        _tell(hooks.on_train_start, TrainStart(model, _unwrapped(rest[1])))
        if hooks.evaluates_at_start and training.get_args().iteration == 0:
            # In the original's order: the validation data, what is done with other data, the model's
            # configuration, a checkpointing context, a function of other data.
            _, _, data, other_data, config, _, other, *_ = rest
            # As before its own evaluations; there is nothing to gather yet.
            if overlapped := training.should_disable_forward_pre_hook(training.get_args()):
                training.disable_forward_pre_hook(model, param_sync=False)
            training.evaluate_and_print_results(
                "iteration 0", forward, data, model, 0, other_data, config,
                non_loss_data_func=other, **more,
            )  # fmt: skip
            if overlapped:
                training.enable_forward_pre_hook(model)
        return train(forward, model, optimizer, *rest, **more)

    @in_place_of((training, "train_step"))
    def note_rate_and_step(
        step: Any, forward: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **more: Any
    ) -> Any:
        nonlocal rate_used
        rate = get_canonical_lr_for_logging(optimizer.param_groups)
        # None where this rank has no parameters; else perhaps a tensor, which the schedule fills anew.
        rate_used = None if rate is None else float(rate)
        return step(forward, data, model, optimizer, *rest, **more)

    @in_place_of((training, "save_checkpoint_and_time"))
    def save_and_tell(save: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        _tell(hooks.on_save_start, iteration)
        result = save(iteration, *args, **kwargs)
        _tell(hooks.on_save_end, iteration)
        return result

    @in_place_of((training, "checkpoint_and_decide_exit"))
    def save_or_end_as_wanted(decide: Any, *args: Any, **kwargs: Any) -> bool:
        ends: bool = decide(*args, **kwargs)
        if hooks.save_wanted or hooks.end_wanted:
            hooks.save_wanted = False
            # In the original's order; where it has saved just now, nothing is written again.
            model, optimizer, schedule, iteration, operations, context, iterator = args
            training.save_checkpoint_and_time(
                iteration,
                model,
                optimizer,
                schedule,
                operations,
                context,
                train_data_iterator=iterator,
            )
        return ends or hooks.end_wanted

    @in_place_of((training, "dummy_train_step"))
    def pass_over(dummy_train_step: Any, data_iterator: Any) -> None:
        # One iterator a virtual pipeline stage; none where tensor parallel rank 0 reads the data.
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        for iterator in iterators:
            for _ in range(training.get_num_microbatches() if iterator is not None else 0):
                next(iterator)

    @in_place_of((training, "training_log"))
    def log_and_tell(
        log: Any, losses: Any, totals: Any, next_rate: Any, iteration: int, *rest: Any, **more: Any
    ) -> Any:
        result = log(losses, totals, rate_used, iteration, *rest, **more)
        # In the original's order: loss scale, a flag of its memory report, skipped, gradient norm.
        skipped, grad_norm = rest[2:4]
        _tell(hooks.on_step, Step(iteration, rate_used, grad_norm, bool(skipped)))
        return result

    @in_place_of((training, "evaluate"))
    def evaluate_whole_split(evaluate: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["eval_iters"] = hooks.evaluation_iterations[current_split]
        return evaluate(*args, **kwargs)

    @in_place_of((training, "evaluate_and_print_results"))
    def evaluate_and_tell(evaluate_and_print: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        nonlocal current_split
        current_split = "test" if prefix.endswith("on test set") else "valid"
        # Positional order of the original: forward_step, data iterator, model, iteration.
        evaluation = Evaluation(current_split, args[3])
        # After the last step Megatron evaluates again what it may just have evaluated.
        if current_split not in hooks.evaluation_iterations or evaluation in evaluated:
            return
        evaluated.add(evaluation)
        _tell(hooks.on_evaluation_start, current_split)
        evaluate_and_print(prefix, *args, **kwargs)
        _tell(hooks.on_evaluation_end, evaluation)
