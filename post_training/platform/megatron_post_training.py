"""The wheel lacks the package `megatron.post_training`, so Megatron forgets ModelOpt without a word.

Upstream: megatron-core 0.19.2, `training/training.py` and `training/checkpointing.py` set
`has_nvidia_modelopt = False` when `megatron.post_training` does not import; then ModelOpt state is not
saved with a checkpoint. `megatron` is a namespace package, so what it looks for can be given from here.

Importing ModelOpt takes as long as importing torch. A model that ModelOpt has converted cannot exist
before its package is imported, so it is imported only when a run needs it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from post_training.errors import SetupError


def maybe_enable_modelopt(args: Any) -> None:
    """Leave `args.modelopt_enabled` as it is: it was set where the checkpoint was chosen."""


def print_distributed_quant_summary(model: Any, msg: str = "") -> None:
    """Print the quantisers of `model` (one model or a list of chunks) on rank 0, if it has any."""
    if not _converted_models_may_exist():
        return
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
    if not _converted_models_may_exist():
        return
    from megatron.core.utils import unwrap_model
    from modelopt.torch.distill import DistillationModel

    if any(isinstance(chunk, DistillationModel) for chunk in unwrap_model(list(model))):
        raise SetupError("the model holds a distillation teacher, which this version cannot load")


def _converted_models_may_exist() -> bool:
    return "modelopt.torch" in sys.modules


def save_sharded_modelopt_state(*args: Any, **kwargs: Any) -> None:
    """As ModelOpt's, for a model that it may have converted."""
    if _converted_models_may_exist():
        from modelopt.torch.opt import plugins

        plugins.save_sharded_modelopt_state(*args, **kwargs)


def save_modelopt_state(*args: Any, **kwargs: Any) -> None:
    """As ModelOpt's, for a model that it may have converted."""
    if _converted_models_may_exist():
        from modelopt.torch.opt import plugins

        plugins.save_modelopt_state(*args, **kwargs)


def get_tensor_shapes_adjust_fn_for_distillation(
    model: nn.Module | list[nn.Module], **kwargs: Any
) -> Any:
    """How the shapes of messages between pipeline stages differ from `[sequence, micro batch, hidden]`.

    Megatron asks only where `args.modelopt_enabled` is true.

    Args:
        model: chunks of this rank. One with the attribute `beside` sends so many numbers a token more.
        kwargs: sizes of a micro batch, for ModelOpt's own, which is asked of all other models.
    """
    from megatron.core.utils import unwrap_model

    beside = getattr(unwrap_model(model if isinstance(model, list) else [model])[0], "beside", 0)
    if beside:

        def widen(*both: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
            return [[(*shape[:-1], shape[-1] + beside) for shape in shapes] for shapes in both]

        return widen
    if not _converted_models_may_exist():
        return None
    from modelopt.torch.distill.plugins import megatron

    return megatron.get_tensor_shapes_adjust_fn_for_distillation(model, **kwargs)


def apply() -> None:
    """Give Megatron the modules and functions it did not find, where no installed package has them."""
    if importlib.util.find_spec("megatron.post_training") is not None:
        return
    # While Megatron is imported it must not import ModelOpt either.
    blocked = "modelopt" not in sys.modules
    if blocked:
        sys.modules["modelopt"] = None  # type: ignore[assignment]
    try:
        from megatron.training import checkpointing, training
    finally:
        if blocked:
            del sys.modules["modelopt"]

    # This file is the package and its modules at once: functions have the names that are looked for.
    for name in ("", ".utils", ".checkpointing"):
        sys.modules["megatron.post_training" + name] = sys.modules[__name__]
    shapes = "get_tensor_shapes_adjust_fn_for_distillation"
    summary = "print_distributed_quant_summary"
    for owner, names in (
        (training, ("maybe_enable_modelopt", shapes)),
        (checkpointing, ("save_modelopt_state", "save_sharded_modelopt_state", summary)),
    ):
        setattr(owner, "has_nvidia_modelopt", True)  # noqa: B010
        for name in names:
            setattr(owner, name, globals()[name])
