"""What watches over a run: ranks make progress, documents stay apart, losses stay finite."""

from __future__ import annotations

import argparse
import functools

from post_training.batch.splits import Split
from post_training.job.watchdog import watchdog
from post_training.metrics.run_log import RunLog
from post_training.platform.training_hooks import hooks
from post_training.training.isolation import check_isolation
from post_training.training.nonfinite import NonFiniteGuard
from post_training.training.trial import ForwardStep


def install_safeguards(
    args: argparse.Namespace,
    forward_step: ForwardStep,
    train: Split | None,
    run_log: RunLog,
) -> None:
    """Register with the training hooks; call it when arguments are validated.

    Args:
        args: validated arguments.
        forward_step: the run's own.
        train: the training data; None when nothing is trained.
        run_log: shows what was found, and times steps without it.
    """
    _report_progress(args)
    if train is None:
        return
    if args.task is None:  # whose rows are no packs
        hooks.on_train_start.append(
            functools.partial(
                check_isolation, forward_step=forward_step, args=args, say=run_log.progress.message
            )
        )
    hooks.on_train_start.append(run_log.start_clock)
    if args.stop_at_nonfinite:
        hooks.on_gradient_norm.append(NonFiniteGuard(args, train.packs).check)


def _report_progress(args: argparse.Namespace) -> None:
    """Let the watchdog know what comes next."""

    def next_step(iteration: int) -> None:
        watchdog.beat(f"at step {iteration + 1}")

    hooks.on_train_start.append(
        # Kernels are compiled and caches filled in the first one.
        lambda start: watchdog.beat(f"at step {args.iteration + 1}", patient=True)
    )
    hooks.on_step.append(lambda step: next_step(step.iteration))
    hooks.on_save_start.append(
        lambda iteration: watchdog.beat(f"saving after step {iteration}", patient=True)
    )
    hooks.on_save_end.append(next_step)
    hooks.on_evaluation_start.append(
        # Its first batch compiles kernels too; with the second batch's beat that is over.
        lambda split: watchdog.beat(f"evaluating on {split}", patient=True, patient_beats=2)
    )
    hooks.on_evaluation_end.append(lambda evaluation: next_step(evaluation.iteration))
