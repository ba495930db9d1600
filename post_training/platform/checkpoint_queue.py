"""How the results of writing a checkpoint reach the process that waits for them, and who writes on a CPU.

Upstream: megatron-core 0.19.2, `core/dist_checkpointing/strategies/filesystem_async.py`:
`get_write_results_queue()` makes a manager process by `spawn`, which imports this program again: four
seconds before the first save on a CPU. A synchronous save writes from threads of its own process and
needs no such queue.

For `--async-save` Megatron's `validate_args()` insists on a persistent worker process
(`core/dist_checkpointing/strategies/async_utils.py`, `PersistentAsyncCaller`). That worker gets tensors of
a CPU as shared memory, which training goes on changing while they are written. A process forked for each
save (`TemporalAsyncCaller`) has the memory as it was at that moment, so on a CPU it is the one to use.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import multiprocessing
import queue
import signal
from multiprocessing.managers import SyncManager
from typing import Any

from post_training.platform import device_type

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this forked process be killed when its parent dies: nobody would use what it writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _become_writer() -> None:
    end_with_parent()
    # The parent answers signals: a writer that is interrupted loses the checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def apply(args: argparse.Namespace) -> None:
    """Choose queue and writer on a CPU; elsewhere Megatron's stay.

    Args:
        args: validated arguments.
    """
    if device_type() != "cpu":
        return
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    if not args.async_save:
        setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010
        return
    args.use_persistent_ckpt_worker = False
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_become_writer)
    setattr(filesystem_async, "_results_queue", manager.Queue())  # noqa: B010
    owner = async_utils.TemporalAsyncCaller
    schedule = owner.schedule_async_call

    @functools.wraps(schedule)
    def schedule_a_writer(self: Any, request: Any) -> None:
        function = request.async_fn
        if function is not None:

            @functools.wraps(function)
            def write(*values: Any, **options: Any) -> None:
                _become_writer()
                function(*values, **options)

            request = request._replace(async_fn=write)
        schedule(self, request)

    if not hasattr(schedule, "__wrapped__"):
        setattr(owner, "schedule_async_call", schedule_a_writer)  # noqa: B010
