"""A checkpoint gives an optimizer its tensors and its step count; what the flags say is this run's.

Upstream: megatron-core 0.19.2. `core/optimizer/distrib_optimizer.py` and `optimizer.py` find a param group
in a checkpoint by its rates, so that another `--lr` finds none, and take betas, epsilon and momentum from
there, whatever the flags say; they also take groups with the same rates for one. Another number of
groups (`--decoupled-lr`) does not merge with what was saved. `core/optimizer/grad_scaler.py`: a loss scale
that was constant leaves nothing behind, in which a dynamic one looks for its own.

Before the first step torch's Adam, which Megatron uses where Transformer Engine and Apex are missing,
has no state, and `state_dict()`, which loading a checkpoint calls to know what to read, asserts that
there is exactly one step count. Then `load_state_dict()` gives all parameters the same step tensor:
Adam's element-wise path adds one to it for every parameter, and the bias correction after a resume is
another than before. Filling the state in, `_set_main_param_and_optimizer_states()` looks for `step`
among the tensors of a parameter, where the loader has left it out.

Where they are not missing, their Adam has to go on with what torch's has left: a step count of type float,
which the kernel of Transformer Engine 2.20 refuses.

With expert parallelism `core/optimizer/optimizer.py` chains two optimizers, for the experts and for the
rest; without it there is one. What a checkpoint holds of one parameter has the same name in both cases,
but step count and loss scale lie in one dictionary or in two, and one does not load as the other.

With SGD, which runs without the distributed optimizer, `core/optimizer/__init__.py` names no function
that makes its state, and loading a checkpoint calls it. Saved before a first step (in fp16 steps are
skipped until the loss scale fits) there is no state, which a run that loads would ask for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from post_training.platform.patches import in_place_of


def _initialise(optimizer: Any) -> None:
    """Give every parameter of a `DistributedOptimizer` the state it has before its first step."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    for group in inner.param_groups:
        for parameter in group["params"]:
            # The fused kernel counts where the parameter is.
            device = parameter.device if group["fused"] else "cpu"
            inner.state[parameter].setdefault("step", torch.zeros((), device=device))


def fit_to_chain(state: dict[Any, Any], optimizers: int) -> dict[Any, Any]:
    """The state for as many optimizers as there are now, from that of as many as there were.

    Args:
        state: what was loaded: param groups, step count and loss scale as they were saved, merged with the
            tensors as they are asked for. Either stands under the numbers of the chained optimizers, or
            directly where there is one. Torch's own part is in it under "optimizer", but for fp32 without
            the distributed optimizer.
        optimizers: how many are chained now.

    Returns:
        `state` itself where the numbers agree; else a copy in the form for `optimizers`, in which all have
        what was saved of the first: its step count and loss scale are those of all.
    """
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    alone = {key: value for key, value in state.items() if not isinstance(key, int)}
    parts = (alone, *numbered.values())
    saved = [part for part in parts if "param_groups" in part.get("optimizer", part)]
    if not saved or len(saved) == optimizers:
        return state
    first = saved[0]
    inner = first.get("optimizer", first)
    steps = {k: v for k, v in inner.get("state", {}).items() if k == "common_step"}
    tensors = ("param_state", "state", "fp32_from_fp16_params", "param_groups")
    common = {key: value for key, value in first.items() if key not in tensors}

    def fitted(part: dict[Any, Any]) -> dict[Any, Any]:
        asked = part.get("optimizer", part)
        own = {
            "param_groups": inner["param_groups"],
            "state": {**asked.get("state", {}), **steps},
        }
        return {**common, **part, **({"optimizer": own} if "optimizer" in first else own)}

    if optimizers == 1:
        return fitted(alone)
    return {number: fitted(numbered.get(number, {})) for number in range(optimizers)}


def settings_of(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Param groups as this run's flags make them, with the step count of a checkpoint's.

    Args:
        groups: this run's.
        saved: those of the checkpoint, however many; a step count, where there is one, is that of all.

    Returns:
        A copy of each of `groups`, without its parameters.
    """
    step = next((group["step"] for group in saved if group.get("step") is not None), None)
    # Torch's Adam leaves a float behind, which the fused ones do not take; it takes either.
    count = {} if step is None else {"step": int(step) if isinstance(step, float) else step}
    return [{**{k: v for k, v in group.items() if k != "params"}, **count} for group in groups]


def own_groups(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """`settings_of`, with the numbers of the parameters as torch's `state_dict()` gives them."""
    numbers = itertools.count()
    return [
        {**settings, "params": list(itertools.islice(numbers, len(group["params"])))}
        for group, settings in zip(groups, settings_of(groups, saved), strict=True)
    ]


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


def apply() -> None:
    """Wrap the optimizers' ways in and out of a state dictionary."""
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    @in_place_of((optimizer.ChainedOptimizer, "load_state_dict"))
    def load_any(load_state_dict: Any, self: Any, state: Any) -> None:
        if isinstance(state, dict):
            state = fit_to_chain(state, len(self.chained_optimizers))
        load_state_dict(self, state)

    @in_place_of((DistributedOptimizer, "load_state_dict"))
    def load_into_own_groups(load_state_dict: Any, self: Any, state: Any) -> None:
        saved = state["optimizer"]["param_groups"]
        settings = settings_of(self.optimizer.param_groups, saved)
        load_state_dict(self, {**state, "optimizer": {"param_groups": settings}})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            # Upstream takes groups with the same rates for one.
            group.update(own)

    @in_place_of((optimizer.MegatronOptimizer, "_filter_and_reorder_param_groups"))
    def keep_own(upstream: Any, groups: Any, saved: Any) -> list[dict[str, Any]]:
        return own_groups(groups, saved)

    @in_place_of((DynamicGradScaler, "load_state_dict"))
    def load_or_start(load_state_dict: Any, self: Any, state: dict[str, Any]) -> None:
        if state:
            load_state_dict(self, state)

    def tensors_alone(
        shard: Any, self: Any, model: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        if self.config.optimizer == "sgd":
            self.init_state_fn = start_momentum
            start_momentum(self.optimizer)
        state = shard(self, model, is_loading, **kwargs)
        if is_loading:
            # Lists of another length do not merge with those that were saved.
            del state.get("optimizer", state)["param_groups"]
        return state

    for owner in (optimizer.FP32Optimizer, optimizer.Float16OptimizerWithFloat16Params):
        in_place_of((owner, "sharded_state_dict"))(tensors_alone)

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    @in_place_of((DistributedOptimizer, "state_dict"))
    def state_dict_of_any_age(state_dict: Any, self: Any) -> Any:
        if len(self.optimizer.state) == 0:
            _initialise(self)
        return state_dict(self)

    @in_place_of((DistributedOptimizer, "load_state_dict"))
    def load_with_own_steps(load_state_dict: Any, self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for values in self.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()

    @in_place_of((DistributedOptimizer, "_set_main_param_and_optimizer_states"))
    def set_without_step(set_states: Any, self: Any, parameter: Any, tensors: Any) -> None:
        # None is passed over; the step count itself comes with the parameter groups.
        set_states(self, parameter, {"step": None, **tensors})
