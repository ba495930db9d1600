"""Errors that are told in one message, without a traceback."""

from __future__ import annotations

import argparse
import os
import re
import time
import traceback
from pathlib import Path
from typing import TextIO


class SetupError(ValueError):
    """What a user got wrong: a run that cannot work as asked, told before any process group starts.

    The message names the flag or file, what was found, and what would fix it.
    """


class RunStopped(RuntimeError):
    """A run that ends itself: raised on every rank at the same place, told once, exit status 1.

    The message says what was found, in which step, and how to continue.
    """


class RankStopped(RunStopped):
    """The same, for what one rank may meet alone, such as a row: the first rank that does so tells it."""


def failed_condition(error: Exception, args: argparse.Namespace) -> str:
    """What an error without a message stumbled over, from the line of source that raised it.

    Args:
        error: such as the `AssertionError` of a bare `assert`; it has been raised.
        args: the values that the line may speak of.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (frame.line or "").strip().rstrip("\\").strip().removesuffix(",")
    names = dict.fromkeys(re.findall(r"\b(?:args|self|config)\.(\w+)", line))
    values = ", ".join(f"{name} is {getattr(args, name)}" for name in names if hasattr(args, name))
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"`{line}` fails in {where}" + (f", where {values}" if values else "")


def tell(error: Exception, console: TextIO, *, started: bool, first: bool = True) -> int:
    """Print an error as one message of the whole job, and return the exit status.

    Args:
        error: a `RunStopped`, which all ranks have, or one that a user can put right.
        console: where this rank prints.
        started: the ranks know each other, so that one of them may have met an error alone.
        first: no other rank has told of an error before.

    Returns:
        1 for a `RunStopped`, else 2.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    together = isinstance(error, RunStopped)
    if isinstance(error, RankStopped):
        if first:
            print(f"error on rank {rank}: {error}", file=console, flush=True)
        else:
            time.sleep(3)
    elif started and not together:
        print(f"error on rank {rank}: {error}", file=console, flush=True)
    elif (rank if together else local_rank) == 0:
        # Before ranks know each other, the first of each machine speaks for all on it.
        print(f"error: {error}", file=console, flush=True)
    else:
        # A launcher ends all ranks with the first one that ends: let that one speak.
        time.sleep(3 if together else 10)
        if not together:  # it has not come so far, or has nothing to say
            print(f"error on rank {rank}: {error}", file=console, flush=True)
    return 1 if together else 2
