"""Megatron's FSDP2 wrapper gives wrong gradients, and its `torch_dcp` checkpoints cannot be resumed.

Upstream: megatron-core 0.19.2, `training/checkpointing.py`: `load_checkpoint()`
asks the optimizer for `state_dict(is_loading=True)`, which neither `FP32Optimizer` nor `ChainedOptimizer`
takes; it asks even where there is none (`--skip-train`), and reads the state in place even where a new
one is wanted (`--finetune`, `--no-load-optim`), and it asks for parts that the checkpoint may lack. The
random states of all ranks are saved under one name, of which one remains; ranks draw different amounts
(attention over packed documents), so each keeps its own here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from post_training.platform.checkpoints.loading import agreed
from post_training.platform.patches import in_place_of


class OptimizerToLoad:
    """What `load_checkpoint()` takes for the optimizer of a `torch_dcp` checkpoint."""

    def __init__(self, optimizer: Any) -> None:
        """Stand for `optimizer`, or for none (None): then nothing is read for it."""
        self.optimizer = optimizer
        self.is_stub_optimizer = optimizer is None or optimizer.is_stub_optimizer

    def state_dict(self, is_loading: bool = True) -> Any:
        """The state to be read into: tensors of the live optimizer."""
        if self.is_stub_optimizer:
            return {}
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            initialise(part.optimizer)
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take over what was read."""
        self.optimizer.load_state_dict(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, which Megatron completes after loading."""
        return [] if self.is_stub_optimizer else list(self.optimizer.param_groups)

    def reload_model_params(self, state_dict: Any = None) -> None:
        """The weights are the fp32 ones: there are no copies of them to renew."""


# What it takes for a learning rate schedule that is not there: nothing is read.
NO_SCHEDULE = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)


def initialise(optimizer: torch.optim.Optimizer | None) -> None:
    """Give a new optimizer the state that it has after a step, without changing a weight.

    A step with zero gradients at learning rate 0 works for every kind of optimizer.
    """
    if optimizer is None or optimizer.state:
        return
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _rng_key() -> str:
    distributed = torch.distributed
    return f"rank {distributed.get_rank()} of {distributed.get_world_size()}"


def apply() -> None:
    """Mend what loads `torch_dcp` checkpoints."""
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args
    from torch.distributed.checkpoint import FileSystemReader

    @in_place_of((checkpointing, "get_rng_state"))
    def state_of_this_rank(get_rng_state: Any, ckpt_format: str, *args: Any, **kwargs: Any) -> Any:
        states = get_rng_state(ckpt_format, *args, **kwargs)
        return {_rng_key(): states[0]} if ckpt_format == "torch_dcp" else states

    @in_place_of((checkpointing, "load_checkpoint"), (training, "load_checkpoint"))
    def load_what_is_wanted(
        load_checkpoint: Any, model: Any, optimizer: Any, schedule: Any, *rest: Any, **more: Any
    ) -> Any:
        flags = get_args()
        if flags.ckpt_format == "torch_dcp":
            anew = flags.finetune or flags.no_load_optim
            optimizer = OptimizerToLoad(None if anew else optimizer)
            if anew or schedule is None:
                schedule = NO_SCHEDULE
        return load_checkpoint(model, optimizer, schedule, *rest, **more)

    @agreed
    def tensors_in(folder: str) -> Any:
        return FileSystemReader(folder).read_metadata().state_dict_metadata

    @in_place_of((checkpointing, "_load_base_checkpoint"))
    def load_what_is_there(load: Any, load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("sharded_state_dict")
        if args.ckpt_format != "torch_dcp" or wanted is None:
            return load(load_dir, args, *rest, **kwargs)
        keys = tensors_in(checkpointing.get_load_checkpoint_path_by_args(args))
        there = {key.partition(".")[0] for key in keys} - {"rng_state"}
        if any(key.startswith(f"rng_state.{_rng_key()}.") for key in keys):
            # Else another number of processes saved, and no state there would be right.
            there.add("rng_state")
        kwargs["sharded_state_dict"] = {k: v for k, v in wanted.items() if k in there and v != {}}
        state, *found = agreed(load)(load_dir, args, *rest, **kwargs)
        state = {**wanted, **state}
        # Megatron looks its own state up in a list of those of all ranks.
        state["rng_state"] = [state["rng_state"][_rng_key()]] * args.world_size
        return (state, *found)
