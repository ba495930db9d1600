"""Resuming with torch's own Adam, which Megatron uses where Transformer Engine and Apex are missing.

Upstream: megatron-core 0.19.2, `core/optimizer/distrib_optimizer.py`. Before the first step torch's Adam
has no state, and `state_dict()`, which loading a checkpoint calls to know what to read, asserts that
there is exactly one step count. Then `load_state_dict()` gives all parameters the same step tensor:
Adam's element-wise path adds one to it for every parameter, and the bias correction after a resume is
another than before. Filling the state in, `_set_main_param_and_optimizer_states()` looks for `step`
among the tensors of a parameter, where the loader has left it out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def _initialise(optimizer: Any) -> None:
    """Give every parameter of a `DistributedOptimizer` the state it has before its first step."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    for state in inner.state.values():
        state.setdefault("step", torch.tensor(0.0))


def apply() -> None:
    """Wrap the distributed optimizer's ways in and out of a state dictionary."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    owner = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = owner.state_dict, owner.load_state_dict

    @functools.wraps(state_dict)
    def state_dict_of_any_age(self: Any) -> Any:
        if len(self.optimizer.state) == 0:
            _initialise(self)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for values in self.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()

    set_states = owner._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def set_states_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # None is passed over; the step count itself comes with the parameter groups.
        set_states(self, model_param, {"step": None, **tensors})

    setattr(owner, "_set_main_param_and_optimizer_states", set_states_without_step)  # noqa: B010
    setattr(owner, "state_dict", state_dict_of_any_age)  # noqa: B010
    setattr(owner, "load_state_dict", load_with_own_steps)  # noqa: B010
