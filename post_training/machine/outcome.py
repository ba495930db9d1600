"""How a run ended, for who started it: a file that `SFT_OUTCOME` names.

An exit status does not tell: a run that was stopped and one that is complete both end with 0, and of
several launchers one may have been killed because another's workers refused their flags.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

NAME = "SFT_OUTCOME"
Outcome = Literal["refused", "prepared", "stopped", "complete"]


def supervised() -> bool:
    """Whether somebody waits for the outcome, and starts again what was stopped."""
    return bool(os.environ.get(NAME))


def note_outcome(outcome: Outcome, **facts: Any) -> None:
    """Write how it ended, where somebody wants to know.

    Args:
        outcome: one word for all processes.
        facts: what belongs to it, such as the newest checkpoint.
    """
    if supervised():
        file = Path(os.environ[NAME])
        whole = file.with_name(f"{file.name}.{os.getpid()}")
        whole.write_text(json.dumps({"outcome": outcome, **facts}))
        whole.replace(file)
