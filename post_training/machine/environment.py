"""The environment variables that libraries read when they start.

How many queues feed a GPU: CUDA reads `CUDA_DEVICE_MAX_CONNECTIONS` when it starts.

Megatron overlaps tensor parallel communication only with one; FSDP2 gathers weights ahead of their use only
with several, and megatron-core 0.19.2 (`training/arguments.py`) refuses it with one. So the choice is made
before the arguments are parsed.
"""

from __future__ import annotations

import os

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


def choose(fsdp2: bool) -> None:
    """Set one connection unless FSDP2 is asked for; what the user has set stays."""
    if not fsdp2:
        os.environ.setdefault(NAME, "1")


def stand_alone() -> None:
    """Let a process without a launcher be rank 0 of 1: torch asks for the launcher's variables."""
    if "RANK" in os.environ:
        return
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in os.environ:
        # Each task would take itself for the whole job and write over the others.
        raise SystemExit(
            "error: srun started several tasks, but RANK and WORLD_SIZE are not set: start torchrun in "
            "one task a node, or export them from SLURM_PROCID and SLURM_NTASKS"
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
