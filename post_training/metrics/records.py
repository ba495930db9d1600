"""Reads `metrics.jsonl` back, whatever a killed run or an editor has left in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a run's `metrics.jsonl` and what each says; those that are no record are left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off when the run was killed
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            found.append((line, record))
    return found
