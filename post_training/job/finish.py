"""How a run ends: what is said, and the export to HuggingFace."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from post_training.errors import RankStopped, RunStopped, SetupError
from post_training.job.signals import GracefulExit
from post_training.job.watchdog import watchdog
from post_training.machine.outcome import note_outcome
from post_training.metrics.run_log import RunLog
from post_training.platform.training_hooks import hooks


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
    except RankStopped:
        raise
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
    exporter: Path,
    best: int | None = None,
) -> None:
    """Say on rank 0 where everything lies, how to continue, and export if that is asked for.

    Args:
        args: validated arguments.
        console: where it is said.
        graceful: knows the signal that stopped the run.
        iteration: the last step.
        exporter: the script that exports the run in `--output-dir`; its folder lies in the project's.
        best: the step of the best evaluation, whose checkpoint is exported in the place of the last one.
    """
    if args.rank != 0:
        return
    if args.eval_only:
        return note_outcome("complete")
    folder = args.output_dir
    if best is not None:
        print(f"the best {args.early_stop_metric} was at step {best}", file=console)
    if iteration < (args.train_iters or 0) and not hooks.end_wanted:
        reason = (
            f"{signal.Signals(graceful.received).name} received" if graceful.received else "told to"
        )
        print(
            f"stopped after step {iteration} of {args.train_iters} ({reason}); checkpoint in {args.save}\n"
            f"to continue, give the same command again",
            file=console,
        )
        note_outcome("stopped", step=iteration, reason=reason)
        if args.save_hf:
            print(
                f"--save-hf exports at the end of training; to export this checkpoint now:\n"
                f"python {'/'.join(exporter.parts[-2:])} --output-dir {shlex.quote(folder)}",
                file=console,
            )
        return
    early = f" of {args.train_iters}, ended early" if hooks.end_wanted else ""
    print(
        f"done: {iteration} steps{early}; metrics, report.html and checkpoints in {folder}",
        file=console,
    )
    if args.save_hf:
        _export_in_new_process(exporter, args, best or iteration, console)
    note_outcome("complete", step=iteration)


def _export_in_new_process(
    exporter: Path, args: argparse.Namespace, iteration: int, console: TextIO
) -> None:
    """Export the run: a whole model in a process without this one's groups.

    Raises:
        SetupError: the export is refused; its own message has been shown.
        RunStopped: it has ended otherwise, as where the job was told to leave: it can be done again.
    """
    # Without the launcher's variables: the new process is on its own.
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(exporter.parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [
            *(sys.executable, str(exporter), "--output-dir", args.output_dir),
            *("--checkpoints", args.save, "--iteration", str(iteration)),
            *("--to", os.path.join(args.output_dir, "hf")),
        ],
        env=environment,
        stdout=console,
        stderr=console,
        check=False,
    )
    if result.returncode:
        how = f"was ended by signal {-result.returncode}" if result.returncode < 0 else "failed"
        raise (SetupError if result.returncode == 2 else RunStopped)(
            f"--save-hf: the export {how}; the checkpoint is complete, export it again"
        )
