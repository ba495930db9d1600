"""How the results of writing a checkpoint reach the process that waits for them, and who writes.

Upstream: megatron-core 0.19.2, `core/dist_checkpointing/strategies/filesystem_async.py`:
`get_write_results_queue()` makes a manager process. A launcher sends SIGTERM to all processes of a rank
(`torchrun`: `os.killpg`), as a terminal does with Ctrl-C: that process ends, and the checkpoint that the
signal asks for fails with a broken pipe. It is also made by `spawn`, which imports this program again: four
seconds before the first save on a CPU. A synchronous save writes from threads of its own process and needs
no such queue.

For `--async-save` Megatron's `validate_args()` insists on a persistent worker process
(`core/dist_checkpointing/strategies/async_utils.py`, `PersistentAsyncCaller`). Such a signal ends it too,
and the next save waits for it without an end. When its rank is killed it stays, with memory of the GPU.

It gets tensors of a CPU as shared memory, which training goes on changing while they are written. A process
forked for each save (`TemporalAsyncCaller`) has the memory as it was at that moment, so on a CPU it is the
one to use.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import multiprocessing
import os
import queue
import signal
import threading
from multiprocessing import connection, resource_tracker, util
from multiprocessing.managers import SyncManager
from typing import Any

from post_training.machine.device import device_type
from post_training.platform.patches import in_place_of

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_with_parent() -> None:
    """Let this forked process be killed when its parent dies: nobody would use what it writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ignore_signals() -> None:
    # The parent answers signals: a writer that is interrupted loses the checkpoint.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _become_writer() -> None:
    end_with_parent()
    _ignore_signals()


def apply(args: argparse.Namespace) -> None:
    """Choose queue and writer.

    Args:
        args: validated arguments.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not args.async_save:
        setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_become_writer)
    setattr(filesystem_async, "_results_queue", manager.Queue())  # noqa: B010
    if device_type() == "cpu":
        _guard_forked_writers()
    else:
        _guard_persistent_worker()


def _guard_forked_writers() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils

    owner = async_utils.TemporalAsyncCaller
    if hasattr(owner.schedule_async_call, "__wrapped__"):
        return

    @in_place_of((owner, "schedule_async_call"))
    def schedule_a_writer(schedule: Any, self: Any, request: Any) -> None:
        function = request.async_fn
        if function is not None:

            @functools.wraps(function)
            def write(*values: Any, **options: Any) -> None:
                _become_writer()
                function(*values, **options)

            request = request._replace(async_fn=write)
        schedule(self, request)


def persistent_loop(*args: Any) -> None:
    """What the persistent worker runs: upstream's loop, deaf to signals, as long as its rank lives.

    Args:
        args: of `PersistentAsyncCaller.async_loop`.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    _ignore_signals()
    threading.Thread(target=_end_with_rank, daemon=True).start()
    PersistentAsyncCaller.async_loop(*args)  # this process has not replaced it


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    connection.wait([rank.sentinel])
    os._exit(1)


def _guard_persistent_worker() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    start = PersistentAsyncCaller._get_process.__func__
    if hasattr(start, "__wrapped__"):
        return
    # The server that forks the worker must not import this program, as newer Pythons let it: that looks for
    # GPUs, and CUDA cannot be used in what is forked after that.
    multiprocessing.set_forkserver_preload([])

    @functools.wraps(start)
    def start_unheard(owner: Any, *args: Any, **kwargs: Any) -> Any:
        known = owner._persistent_process
        resource_tracker.ensure_running()  # it would let signals through again
        # Held back for this process; the worker is deaf from its first moment, since it gets the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process = start(owner, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if process is not known:
            # After an error it is not closed, and the way out of this process is to wait for it.
            util.Finalize(None, process.kill, exitpriority=10)
        return process

    for name, replacement in (
        ("_get_process", classmethod(start_unheard)),
        ("async_loop", staticmethod(persistent_loop)),
    ):
        setattr(PersistentAsyncCaller, name, replacement)
