"""The wheel lacks the package `megatron.post_training`, so Megatron forgets ModelOpt without a word.

Upstream: megatron-core 0.19.2, `training/training.py` and `training/checkpointing.py` set
`has_nvidia_modelopt = False` when `megatron.post_training` does not import; then ModelOpt state is not
saved with a checkpoint. `megatron` is a namespace package, so what it looks for can be given from here;
the functions are in `post_training/modelopt_state.py`.

Importing ModelOpt takes as long as importing torch. A model that ModelOpt has converted cannot exist
before its package is imported, so it is imported only when a run needs it.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


def _converted_models_may_exist() -> bool:
    return "modelopt.torch" in sys.modules


def _save_sharded_modelopt_state(*args: Any, **kwargs: Any) -> None:
    if _converted_models_may_exist():
        from modelopt.torch.opt.plugins import save_sharded_modelopt_state

        save_sharded_modelopt_state(*args, **kwargs)


def _save_modelopt_state(*args: Any, **kwargs: Any) -> None:
    if _converted_models_may_exist():
        from modelopt.torch.opt.plugins import save_modelopt_state

        save_modelopt_state(*args, **kwargs)


def _tensor_shapes_for_distillation(*args: Any, **kwargs: Any) -> Any:
    # Megatron asks only where `maybe_enable_modelopt` said yes.
    from modelopt.torch.distill.plugins import megatron

    return megatron.get_tensor_shapes_adjust_fn_for_distillation(*args, **kwargs)


def apply() -> None:
    """Give Megatron the modules and functions it did not find, where no installed package has them."""
    if importlib.util.find_spec("megatron.post_training") is not None:
        return
    from post_training import modelopt_state

    # While Megatron is imported it must not import ModelOpt either.
    blocked = "modelopt" not in sys.modules
    if blocked:
        sys.modules["modelopt"] = None  # type: ignore[assignment]
    try:
        from megatron.training import checkpointing, training
    finally:
        if blocked:
            del sys.modules["modelopt"]

    package = ModuleType("megatron.post_training")
    package.__path__ = []
    found: dict[str, dict[str, Any]] = {
        "utils": {
            "maybe_enable_modelopt": modelopt_state.maybe_enable_modelopt,
            "print_distributed_quant_summary": modelopt_state.print_distributed_quant_summary,
        },
        "checkpointing": {
            "load_kd_teacher_checkpoint": modelopt_state.load_kd_teacher_checkpoint,
        },
    }
    sys.modules[package.__name__] = package
    for name, functions in found.items():
        module = ModuleType(f"megatron.post_training.{name}")
        for function_name, function in functions.items():
            setattr(module, function_name, function)
        setattr(package, name, module)
        sys.modules[module.__name__] = module

    for owner, attributes in (
        (
            training,
            {
                "has_nvidia_modelopt": True,
                "maybe_enable_modelopt": modelopt_state.maybe_enable_modelopt,
                "get_tensor_shapes_adjust_fn_for_distillation": _tensor_shapes_for_distillation,
            },
        ),
        (
            checkpointing,
            {
                "has_nvidia_modelopt": True,
                "save_modelopt_state": _save_modelopt_state,
                "save_sharded_modelopt_state": _save_sharded_modelopt_state,
                "print_distributed_quant_summary": modelopt_state.print_distributed_quant_summary,
            },
        ),
    ):
        for name, value in attributes.items():
            setattr(owner, name, value)
