"""ModelOpt state beside a Megatron checkpoint: quantisers, distillation and speculative heads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from post_training.checkpoints import latest_checkpoint
from post_training.errors import SetupError

STATE_FOLDER = "modelopt_state"


def has_modelopt_state(folder: str | Path | None) -> bool:
    """Whether the newest checkpoint in `folder` was made from a model that ModelOpt converted."""
    checkpoint = latest_checkpoint(folder)
    return checkpoint is not None and (checkpoint / STATE_FOLDER).is_dir()


def restore_modelopt_state(model: list[nn.Module], folder: str | Path) -> None:
    """Convert the freshly built `model` as the newest checkpoint in `folder` says; weights follow later.

    Does nothing when that checkpoint holds no ModelOpt state.
    """
    if not has_modelopt_state(folder):
        return
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    restore_sharded_modelopt_state(model, str(latest_checkpoint(folder)))


def maybe_enable_modelopt(args: argparse.Namespace) -> None:
    """Set `args.modelopt_enabled`: Megatron asks ModelOpt for tensor shapes only where it is true."""
    args.modelopt_enabled = has_modelopt_state(getattr(args, "load", None))


def print_distributed_quant_summary(model: Any, msg: str = "") -> None:
    """Print the quantisers of `model` (one model or a list of chunks) on rank 0, if it has any."""
    if "modelopt.torch" not in sys.modules:
        return  # nothing can have been quantised
    from megatron.core.utils import unwrap_model
    from megatron.training.utils import is_rank0
    from modelopt.torch.quantization import print_quant_summary
    from modelopt.torch.quantization.utils import is_quantized

    chunks = unwrap_model(model if isinstance(model, list) else [model])
    for chunk in chunks:
        if is_quantized(chunk) and is_rank0():
            print(msg)
            print_quant_summary(chunk)


def load_kd_teacher_checkpoint(model: Sequence[nn.Module]) -> None:
    """Load the teacher of a distillation model.

    Raises:
        SetupError: `model` is a ModelOpt distillation model: no flag of this version names a teacher.
    """
    if "modelopt.torch" not in sys.modules:
        return
    from megatron.core.utils import unwrap_model
    from modelopt.torch.distill import DistillationModel

    if any(isinstance(chunk, DistillationModel) for chunk in unwrap_model(list(model))):
        raise SetupError("the model holds a distillation teacher, which this version cannot load")
