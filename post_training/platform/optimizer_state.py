"""Resuming with torch's own Adam, which Megatron uses where Transformer Engine and Apex are missing.

Upstream: megatron-core 0.19.2, `core/optimizer/distrib_optimizer.py`. Before the first step torch's Adam
has no state, and `state_dict()`, which loading a checkpoint calls to know what to read, asserts that
there is exactly one step count. Then `load_state_dict()` gives all parameters the same step tensor:
Adam's element-wise path adds one to it for every parameter, and the bias correction after a resume is
another than before. Filling the state in, `_set_main_param_and_optimizer_states()` looks for `step`
among the tensors of a parameter, where the loader has left it out.

Where they are not missing, their Adam has to go on with what torch's has left: param groups without
`bias_correction`, which it looks up in every step, and a step count of type float, which the kernel of
Transformer Engine 2.20 refuses.

With expert parallelism `core/optimizer/optimizer.py` chains two optimizers, for the experts and for the
rest; without it there is one. What a checkpoint holds of one parameter has the same name in both cases,
but param groups and settings lie in one dictionary or in two, and one does not load as the other.

With SGD, which runs without the distributed optimizer, `core/optimizer/__init__.py` names no function
that makes its state, and loading a checkpoint calls it. Saved before a first step (in fp16 steps are
skipped until the loss scale fits) there is no state, which a run that loads would ask for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def _initialise(optimizer: Any) -> None:
    """Give every parameter of a `DistributedOptimizer` the state it has before its first step."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    for group in inner.param_groups:
        for parameter in group["params"]:
            # The fused kernel counts where the parameter is.
            device = parameter.device if group["fused"] else "cpu"
            inner.state[parameter].setdefault("step", torch.zeros((), device=device))


def _for_any_chain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings of param groups, found for experts and for the rest.

    A group is looked up by its settings, of which "for experts" is one; later ones come first.
    """
    flipped = [{**g, "is_expert_parallel": not g["is_expert_parallel"]} for g in groups]
    return [*flipped, *groups]


def fit_whole_to_chain(state: dict[Any, Any], optimizers: int) -> dict[Any, Any]:
    """`fit_to_chain` for optimizers that are not distributed, whose states have the form of torch.

    Where there are copies of bf16 weights, torch's own part is in it under "optimizer".
    """
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    alone = {key: value for key, value in state.items() if not isinstance(key, int)}

    def groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = part.get("optimizer", part).get("param_groups", [])
        return found

    def fitted(part: dict[Any, Any]) -> dict[Any, Any]:
        # The groups asked for say which parameters, in their order; those behind them are looked up in.
        own = [{"params": group["params"]} for group in groups(part)]
        if "optimizer" in part:
            return {**rest, **part, "optimizer": {**part["optimizer"], "param_groups": own + saved}}
        return {**part, "param_groups": own + saved}

    parts = [part for part in (alone, *numbered.values()) if part]
    if len([part for part in parts if any("lr" in group for group in groups(part))]) == optimizers:
        return state
    rest = {key: value for part in parts for key, value in part.items() if key == "grad_scaler"}
    saved = [group for part in parts for group in groups(part) if "lr" in group]
    saved = [{**group, "params": []} for group in _for_any_chain(saved)]
    return fitted(alone) if optimizers == 1 else {i: fitted(numbered[i]) for i in range(optimizers)}


def fit_to_chain(state: dict[Any, Any], optimizers: int) -> dict[Any, Any]:
    """Settings of as many optimizers as there are now, from those of as many as there were.

    Args:
        state: what was loaded: settings as they were saved, merged with the tensors as they are asked for.
            Either stands under the numbers of the chained optimizers, or directly where there is one.
        optimizers: how many are chained now.

    Returns:
        `state` itself where the numbers agree; else a copy in the form for `optimizers`.
    """
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    alone = {key: value for key, value in state.items() if not isinstance(key, int)}
    asked = [alone] if optimizers == 1 else [numbered.get(i, {}) for i in range(optimizers)]
    saved = [each for each in (alone, *numbered.values()) if "optimizer" in each]
    fits = len(saved) == optimizers and all("optimizer" in each for each in asked)
    if fits or not saved or not all("param_state" in each for each in asked):
        return state
    groups = _for_any_chain(
        [group for each in saved for group in each["optimizer"]["param_groups"]]
    )
    settings = {key: value for key, value in saved[0].items() if key != "param_state"}
    settings["optimizer"] = {**saved[0]["optimizer"], "param_groups": groups}
    fitted = [{**settings, "param_state": each["param_state"]} for each in asked]
    return fitted[0] if optimizers == 1 else dict(enumerate(fitted))


def _load_chains_of_any_length() -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load_state_dict = ChainedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_any(self: Any, state: Any) -> None:
        if isinstance(state, dict):
            distributed = self.chained_optimizers[0].config.use_distributed_optimizer
            fit = fit_to_chain if distributed else fit_whole_to_chain
            state = fit(state, len(self.chained_optimizers))
        load_state_dict(self, state)

    setattr(ChainedOptimizer, "load_state_dict", load_any)  # noqa: B010


def start_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give SGD the state before its first step: momentum * 0 + gradient is what that step computes.

    Args:
        optimizer: SGD; without momentum it has no state.
        config: Megatron's settings, which are not needed.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def complete_groups(state: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A state dictionary of torch's Adam for that of Transformer Engine or Apex, or of those as it is.

    Args:
        state: param groups, with whole step counts where there are any, and states of parameters.
        defaults: settings for the groups that lack them.
    """
    groups = [{**defaults, **group} for group in state["param_groups"]]
    for group in groups:
        if isinstance(group.get("step"), float):
            group["step"] = int(group["step"])
    return {**state, "param_groups": groups}


def _go_on_with_torchs_adam(fused_adam: Any) -> None:
    load_state_dict = fused_adam.load_state_dict

    @functools.wraps(load_state_dict)
    def load_of_any_adam(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, complete_groups(state, self.defaults))

    setattr(fused_adam, "load_state_dict", load_of_any_adam)  # noqa: B010


def _shard_momentum() -> None:
    from megatron.core.optimizer import optimizer as module

    def with_momentum(sharded_state_dict: Any) -> Any:
        @functools.wraps(sharded_state_dict)
        def shard(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.config.optimizer == "sgd":
                self.init_state_fn = start_momentum
                start_momentum(self.optimizer)
            return sharded_state_dict(self, *args, **kwargs)

        return shard

    for owner in (module.FP32Optimizer, module.Float16OptimizerWithFloat16Params):
        setattr(owner, "sharded_state_dict", with_momentum(owner.sharded_state_dict))  # noqa: B010


def apply() -> None:
    """Wrap the optimizers' ways in and out of a state dictionary."""
    from megatron.core.optimizer import distrib_optimizer

    _load_chains_of_any_length()
    _shard_momentum()
    if distrib_optimizer.HAVE_APEX_OR_TE:
        _go_on_with_torchs_adam(distrib_optimizer.Adam)
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
