"""Asks Megatron as it is installed, without the platform layer, what the patches are there for.

Run as a script in its own interpreter; prints a JSON object: for each subject what happened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def _outcome(function: Callable[[], Any]) -> str:
    """What a call came to, as text: its result, or the exception it ended with."""
    try:
        return f"returned {function()!r}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any failure is the answer
        return f"{type(error).__name__}: {error}"


def _probe() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    compiled = torch.compile(lambda x: x * 2)
    found["compile wraps"] = hasattr(compiled, "_torchdynamo_orig_callable")

    from megatron.core import jit

    found["jit fuser is torch.compile"] = jit.jit_fuser is torch.compile
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.training import checkpointing, training

    found["has modelopt"] = [training.has_nvidia_modelopt, checkpointing.has_nvidia_modelopt]
    found["megatron.post_training"] = importlib.util.find_spec("megatron.post_training") is not None
    with contextlib.redirect_stdout(io.StringIO()):
        found["compile_helpers"] = _outcome(dataset_utils.compile_helpers)
    found["tensor on cuda"] = _outcome(lambda: torch.zeros(1, device="cuda"))
    found["Tensor.cuda"] = _outcome(torch.zeros(1).cuda)
    found["current device"] = _outcome(torch.cuda.current_device)
    found["rng state"] = _outcome(tp_random._get_cuda_rng_state)
    from megatron.core.transformer.moe import token_dispatcher

    splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True)
    found["split sizes"] = type(splits).__name__
    found["initialize"] = _outcome(training.initialize_megatron)
    return found


if __name__ == "__main__":
    real_stdout = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the answer
    answer = _probe()
    with os.fdopen(real_stdout, "w") as out:
        json.dump(answer, out)
    sys.stdout.flush()
    os._exit(0)
