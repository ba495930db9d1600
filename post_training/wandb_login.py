"""Whether Weights & Biases can be reached by this run, asked before anything starts."""

from __future__ import annotations

import importlib.util
import os

from post_training.errors import SetupError


def check_wandb() -> None:
    """Look for the package and for credentials; nothing is sent.

    Raises:
        SetupError: wandb is not installed, or is to log online and has no API key.
    """
    if importlib.util.find_spec("wandb") is None:
        raise SetupError("--wandb-project: wandb is not installed (pip install '.[wandb]')")
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return  # the same credentials; importing wandb takes a second
    import wandb
    from wandb.errors import UsageError

    settings = wandb.setup().settings
    if settings.mode != "online":
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except UsageError:
        known = False
    if not known:
        raise SetupError(
            "--wandb-project: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or log to files "
            "only with WANDB_MODE=offline"
        )
