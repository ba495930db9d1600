"""Megatron starts a process of its own to hold a queue that synchronous saves do not need.

Upstream: megatron-core 0.19.2, `core/dist_checkpointing/strategies/filesystem_async.py`:
`get_write_results_queue()` makes a manager process by `spawn`, which imports this program again: four
seconds before the first save on a CPU. A synchronous save writes from threads of its own process.
"""

from __future__ import annotations

import queue

from post_training.platform import device_type


def apply(*, async_save: bool) -> None:
    """Give synchronous saves on a CPU a queue of this process.

    Args:
        async_save: `--async-save`: another process writes, and its results must cross over.
    """
    if async_save or device_type() != "cpu":
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010
