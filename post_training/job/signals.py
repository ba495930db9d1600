"""Ctrl-C and SIGTERM: finish the step, save, and leave with status 0."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import time
from types import FrameType
from typing import TextIO

from post_training.job.watchdog import watchdog

# Seconds within which several signals are one: a scheduler and a launcher may both send it.
ONE_SIGNAL = 5.0

_interrupted = False


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT until there is a step to finish: raises KeyboardInterrupt, and remembers it.

    Where Python calls a finaliser the exception is printed and forgotten; `raise_if_interrupted` is not.
    """
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where one has been raised before, and been swallowed."""
    if _interrupted:
        raise KeyboardInterrupt


class GracefulExit:
    """Turns the first SIGINT or SIGTERM into Megatron's request to save and exit.

    Megatron's own handler (`--exit-signal-handler`) hears one signal only; after each step all ranks
    agree on whether one of them has heard it. SIGINT ends the process at once when it comes again after
    `ONE_SIGNAL` seconds: somebody is impatient. SIGTERM never does: it is a scheduler's, which sends it to
    every process, once more at its time limit, and SIGKILL when it waits no longer.
    """

    def __init__(self, args: argparse.Namespace, console: TextIO) -> None:
        """Install the handlers; Megatron's must be in place already.

        Args:
            args: validated arguments.
            console: where rank 0 says what happens.

        Raises:
            KeyboardInterrupt: SIGINT has come before, and was lost.
        """
        from megatron.training.global_vars import get_signal_handler

        self.received: int | None = None
        self._heard = 0.0
        self.console = console if args.rank == 0 else None
        self.megatron = get_signal_handler()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        raise_if_interrupted()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if watchdog.job_ends():
            return  # a launcher ends the ranks that are left; there is nobody to save with
        if self.received is not None:
            if number == signal.SIGTERM or time.monotonic() - self._heard < ONE_SIGNAL:
                return
            watchdog.stop()  # the others are told the same; nobody died
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.received, self._heard = number, time.monotonic()
        self.megatron._signal_received = True
        if self.console is not None:
            once_more = f"Ctrl-C after {ONE_SIGNAL:.0f} s leaves without saving"
            name = signal.Signals(number).name
            _say(f"\n{name}: saving after this step; {once_more}\n", self.console)


def _say(text: str, stream: TextIO) -> None:
    """Write from a signal handler, which may have come in the middle of another write to `stream`."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # no file, as in a notebook
        print(text, end="", file=stream, flush=True)
        return
    # The stream's own buffer refuses a second writer: "reentrant call".
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())
