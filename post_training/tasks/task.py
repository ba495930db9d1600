"""What a task is: a class with three methods, which `--task FILE.py:ClassName` names.

    build_dataloader(data_paths, eval_dataset=False)    rows: a DataLoader, or (dataset, collate_fn)
    get_train_model_output(batch)                       what is trained: a loss in one of several forms
    get_eval_model_output(batch)                        how many of the batch's rows are right
    build_model()                                       optional: a model of the task's own

The method names are those of RLinf's guide to new models for SFT, whose classes run here as they are. All
else (order, shards, resume, gradient accumulation, precision, checkpoints, logs) is the run's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from post_training.errors import SetupError
from post_training.machine.device import current_device

_OF_CONVERSATIONS = ("chat_template", "conversation_format")
# What `build_model` has no part in, and why.
_OF_HF_MODEL = {
    "lora": "factors belong to the weights of",
    "freeze": "the part that sees is one of",
    "recompute_granularity": "gradient checkpointing is that of",
    "random_weights": "these weights are in the place of those of",
    "save_hf": "a HuggingFace folder is made of",
}
METHODS = ("build_dataloader", "get_train_model_output", "get_eval_model_output")


class SFTTask:
    """A base for tasks, which says what they find on themselves; any class with the methods will do.

    Attributes:
        cfg: the run's arguments, with the sections of an RLinf file that `--config` names.
        tokenizer: of --hf-model or --hf-tokenizer; None without either.
        device: where the model computes.
        model: the model, whole or sharded: called like the model itself, and `generate`; set before the
            first batch.
        amp_context: does nothing: FSDP2 casts weights to the precision of the flags.
        uses_data_flags: whether `build_dataloader` heeds the flags of conversations.
    """

    uses_data_flags = False

    def __init__(self, cfg: argparse.Namespace) -> None:
        """Keep the arguments."""
        self.cfg = cfg

    tokenizer: Any
    device: torch.device
    model: Any
    amp_context: Any


def load_task(
    args: argparse.Namespace, tokenizer: Any, sections: Mapping[str, Any] | None = None
) -> Any:
    """The task that `--task` names, made.

    Args:
        args: parsed arguments.
        tokenizer: the run's, or None.
        sections: of a configuration of another system, which `cfg` has then too: `cfg.data.prompt_key`.

    Raises:
        SetupError: there is no such class, it cannot be made, or it lacks a method.
    """
    file, _, name = args.task.rpartition(":")
    if not file:
        file, _, name = args.task.rpartition(".")
    if not file:
        raise SetupError(
            f"--task {args.task}: expected FILE.py:ClassName or package.module:ClassName"
        )
    module = _module(file, args.task)
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        own = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise SetupError(
            f"--task {args.task}: {file} has no class {name}; it has {', '.join(own) or 'none'}"
        )
    lacking = [method for method in METHODS if not callable(getattr(kind, method, None))]
    if lacking:
        raise SetupError(f"--task {args.task}: {name} has no {' and no '.join(lacking)}")
    for key in () if getattr(kind, "uses_data_flags", False) else _OF_CONVERSATIONS:
        if getattr(args, key):
            raise SetupError(
                f"--{key.replace('_', '-')}: --task {args.task} reads its own rows; leave it out"
            )
    cfg = args
    if sections:
        from omegaconf import OmegaConf

        groups = {key: OmegaConf.create(v) for key, v in sections.items() if isinstance(v, dict)}
        cfg = argparse.Namespace(**{**vars(args), **groups})
    try:
        takes_none = not inspect.signature(kind).parameters
        task = kind() if takes_none else kind(cfg)
    except Exception as error:
        raise SetupError(f"--task {args.task}: {name} cannot be made: {_shown(error)}") from error
    for key, part in _OF_HF_MODEL.items() if hasattr(task, "build_model") else ():
        if getattr(args, key):
            flag = "lora_rank" if key == "lora" else key
            raise SetupError(
                f"--{flag.replace('_', '-')}: {name} makes its own model (build_model), and {part} "
                f"--hf-model; leave one of them out"
            )
    facts = {
        "cfg": cfg,
        "tokenizer": tokenizer,
        "device": current_device(),
        "amp_context": contextlib.nullcontext(),
    }
    for key, value in facts.items():
        setattr(task, key, value)
    return task


def source_file(task: Any) -> Path | None:
    """The file that a task's class is in, if it is in one."""
    name = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    return Path(name) if name else None


def _module(file: str, asked: str) -> ModuleType:
    try:
        if not file.endswith(".py"):
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))  # a script has its own folder there
            return importlib.import_module(file)
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            raise SetupError(f"--task {asked}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Workers of a DataLoader look for classes of rows by the module's name.
        sys.modules[path.stem] = module
        sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module
    except SetupError:
        raise
    except Exception as error:  # whatever the file does when it is imported
        raise SetupError(f"--task {asked}: {file} cannot be imported: {_shown(error)}") from error


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
