"""Small files that hold one object, written by a run or by whoever made a model: read, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import SetupError

# In config.yaml: the names of the flags that nobody wrote.
DERIVED = "derived_flags"


def json_object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds.

    Raises:
        SetupError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SetupError(f"{path}: cannot be read as JSON ({reason}); restore the file") from error
    if not isinstance(found, dict):
        raise SetupError(
            f"{path}: holds {type(found).__name__}, expected a JSON object; restore the file"
        )
    return found


def let_all_read(folder: Path) -> None:
    """Give weight files the mode that the umask gives: safetensors makes them for their owner only."""
    other = folder / ".mode"
    other.touch()
    mode = other.stat().st_mode
    other.unlink()
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def config_of_run(folder: Path) -> dict[str, Any]:
    """What `config.yaml` in an output folder says; empty where there is none, or it is no run's.

    Other tools write files of that name, and one that is broken says as little.
    """
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    ours = isinstance(found, dict) and isinstance(found.get(DERIVED), list)
    return found if ours else {}
