"""How a run ends, and what is said."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
from collections.abc import Callable, Iterator
from typing import TextIO

import torch

from post_training.errors import RunStopped
from post_training.run_log import RunLog
from post_training.signals import GracefulExit
from post_training.watchdog import watchdog


@contextlib.contextmanager
def ending_together(run_log: RunLog) -> Iterator[None]:
    """Around `pretrain()`: close what it leaves open.

    The process group is destroyed only where every rank does so. An error of this rank alone leaves it as
    it is: with NCCL its destruction waits for the others, which wait in a collective for this rank, and
    the error would never be told.

    Args:
        run_log: of this run.

    Raises:
        SystemExit: Megatron left before the first step, as where a checkpoint cannot be read.
    """
    try:
        yield
    except SystemExit as exit_:
        # Megatron leaves this way after a signal, --exit-interval or --exit-duration-in-mins; but also,
        # with status 0, where a checkpoint cannot be read.
        if exit_.code or not run_log.begun:
            _leave_group()
            raise SystemExit(exit_.code or 1) from exit_
    except RunStopped:
        _leave_group()
        raise
    finally:
        run_log.finish()
    _leave_group()


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    watchdog.stop()


def report_end(
    args: argparse.Namespace,
    console: TextIO,
    graceful: GracefulExit,
    iteration: int,
    export: Callable[[argparse.Namespace, int, TextIO], None],
) -> None:
    """Say on rank 0 where everything lies, how to continue, and `export` if that is asked for."""
    if args.rank != 0 or args.eval_only:
        return
    folder = args.output_dir
    if iteration < (args.train_iters or 0):
        reason = (
            f"{signal.Signals(graceful.received).name} received" if graceful.received else "told to"
        )
        print(
            f"stopped after step {iteration} of {args.train_iters} ({reason}); checkpoint in {args.save}\n"
            f"to continue, give the same command again",
            file=console,
        )
        if args.save_hf:
            print(
                f"--save-hf exports at the end of training; to export this checkpoint now:\n"
                f"python scripts/export_hf.py --output-dir {shlex.quote(folder)}",
                file=console,
            )
        return
    print(f"done: {iteration} steps; metrics, loss.png and checkpoints in {folder}", file=console)
    if args.save_hf:
        export(args, iteration, console)
