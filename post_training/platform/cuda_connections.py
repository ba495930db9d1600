"""How many queues feed a GPU: CUDA reads `CUDA_DEVICE_MAX_CONNECTIONS` when it starts.

Megatron overlaps tensor parallel communication only with one; FSDP2 gathers weights ahead of their use only
with several, and megatron-core 0.19.2 (`training/arguments.py`) refuses it with one. So the choice is made
before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


def asks_for_fsdp2(argv: Sequence[str]) -> bool:
    """Whether `--use-torch-fsdp2` is on the command line or in the file of `--config`.

    What is wrong with either is told when the arguments are parsed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--use-torch-fsdp2", action="store_true")
    parser.add_argument("--config", nargs="?")
    known, _ = parser.parse_known_args(list(argv))
    if known.use_torch_fsdp2 or known.config is None:
        return bool(known.use_torch_fsdp2)
    try:
        content = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(content, dict):
        return False
    return any(
        str(key).lstrip("-").replace("-", "_") == "use_torch_fsdp2" and value is True
        for key, value in content.items()
    )


def choose(argv: Sequence[str]) -> None:
    """Set one connection unless FSDP2 is asked for; what the user has set stays.

    Args:
        argv: the command line without the program's name.
    """
    if not asks_for_fsdp2(argv):
        os.environ.setdefault(NAME, "1")
