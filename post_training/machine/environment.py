"""The environment variables that libraries read when they start.

How many queues feed a GPU: CUDA reads `CUDA_DEVICE_MAX_CONNECTIONS` when it starts.

Megatron overlaps tensor parallel communication only with one; FSDP2 gathers weights ahead of their use only
with several, and megatron-core 0.19.2 (`training/arguments.py`) refuses it with one. So the choice is made
before the arguments are parsed.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
# Of torch's memory on CUDA, by its new and its old name.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def choose(fsdp2: bool) -> None:
    """Set one connection unless FSDP2 is asked for; what the user has set stays."""
    if not fsdp2:
        os.environ.setdefault(NAME, "1")


def let_memory_grow() -> None:
    """Let segments of CUDA's memory grow, so that packs of many shapes leave no holes; unless set."""
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[1]] = "expandable_segments:True"


def stand_alone() -> None:
    """Let a process without a launcher be rank 0 of 1: torch asks for the launcher's variables.

    What a launcher has set is checked: Megatron and torch would only say that it is no number.

    Raises:
        SystemExit: with status 2, told; the variables cannot be those of one process of a job.
    """
    if os.environ.get("SFT_DEVICE") not in (None, "", "cpu", "cuda"):
        _refuse(f"SFT_DEVICE is {os.environ['SFT_DEVICE']!r}: cpu or cuda")
    if "RANK" in os.environ:
        _check_launcher()
        return
    if (_number("SLURM_NTASKS", 1) or 1) > 1 and "SLURM_PROCID" in os.environ:
        # Each task would take itself for the whole job and write over the others.
        _refuse(
            "srun started several tasks, but RANK and WORLD_SIZE are not set: start torchrun in one task "
            "a node, or export them from SLURM_PROCID and SLURM_NTASKS"
        )
    if (_number("WORLD_SIZE", 1) or 1) > 1:
        _refuse(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK is not set; torchrun sets both"
        )
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),  # nobody else has to know it: the store takes one that is free
    ):
        os.environ.setdefault(name, value)
    _check_launcher()  # some may have been set alone


def _check_launcher() -> None:
    """Check rank and number of processes, of the job and of this machine, and where rank 0 listens."""
    for rank_name, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        rank, size = _number(rank_name, 0), _number(size_name, 1)
        if rank is not None and size is not None and rank >= size:
            _refuse(
                f"{rank_name} is {rank}, but {size_name} is {size}: ranks begin at 0; use torchrun"
            )
    here, everywhere = _number("LOCAL_WORLD_SIZE", 1), _number("WORLD_SIZE", 1)
    if here is not None and everywhere is not None and here > everywhere:
        _refuse(f"LOCAL_WORLD_SIZE is {here}, but WORLD_SIZE is {everywhere}: use torchrun")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name) and (name == "WORLD_SIZE" or os.environ["WORLD_SIZE"] != "1"):
            _refuse(f"RANK is set, but {name} is not; torchrun sets both")
    port = _number("MASTER_PORT", 0)
    if port is not None and port > 65535:
        _refuse(f"MASTER_PORT is {port}: must be at most 65535")


def _number(name: str, low: int) -> int | None:
    """An integer of the environment, at least `low`; None where it is not set."""
    text = os.environ.get(name)
    if text is None or (name.startswith("SLURM") and not text):
        return None
    try:
        number = int(text)
    except ValueError:
        _refuse(f"{name} is {text!r}: expects an integer; torchrun sets it")
    if number < low:
        _refuse(f"{name} is {number}: must be at least {low}; torchrun sets it")
    return number


def _refuse(message: str) -> NoReturn:
    """End this process; no rank knows another yet, and the first of a machine may not know that it is."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
