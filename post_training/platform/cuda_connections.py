"""How many queues feed a GPU: CUDA reads `CUDA_DEVICE_MAX_CONNECTIONS` when it starts.

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
