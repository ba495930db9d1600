"""That a resumed run continues bit for bit is in `tests/runs/test_finetune.py`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer

from post_training.platform.checkpoints.optimizer_state import (
    _initialise,
    fit_to_chain,
    own_groups,
    settings_of,
    start_momentum,
)
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank


def _fresh_state(argv, patched):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not patched:
        setattr(DistributedOptimizer, "state_dict", DistributedOptimizer.state_dict.__wrapped__)  # noqa: B010
    _, built = megatron_model.set_up(argv)
    optimizer = built[1]
    # What Adam holds after it has been asked before its first step.
    optimizer.state_dict()
    (inner,) = (o.optimizer for o in optimizer.chained_optimizers)
    steps = [state["step"] for state in inner.state.values()]
    return [float(step) for step in steps], len({id(step) for step in steps})


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_kernel_counts_where_the_parameter_is(fused):
    """Saved before its first step, as where fp16 has skipped it, Adam goes on with this state."""
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))
    adam = torch.optim.AdamW([parameter], foreach=False)
    adam.param_groups[0]["fused"] = fused

    def make_moments(optimizer, config):
        optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)

    _initialise(SimpleNamespace(optimizer=adam, init_state_fn=make_moments, config=None))
    assert adam.state[parameter]["step"].device.type == ("meta" if fused else "cpu")


@pytest.fixture
def argv(hf_model, tmp_path):
    return megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))


def test_state_before_the_first_step(argv):
    steps, counters = run_rank(_fresh_state, argv, True)
    assert steps and set(steps) == {0.0} and counters == len(steps)


def test_still_needed_upstream_has_no_state_before_the_first_step(argv):
    with pytest.raises(AssertionError, match=r"(?s)distrib_optimizer.*Error"):
        run_rank(_fresh_state, argv, False)


def _momentum_to_read(argv):
    _, (chunks, optimizer, _) = megatron_model.set_up([*argv, "--optimizer", "sgd"])
    (inner,) = optimizer.chained_optimizers
    upstream = inner.init_state_fn
    tensors = chunks[0].sharded_state_dict()
    state = optimizer.sharded_state_dict(tensors, is_loading=True)
    keys = [one["momentum_buffer"].key for one in state["state"].values()]
    parameters = [name for name, _ in chunks[0].named_parameters()]
    return upstream, len(keys), len(parameters)


def test_momentum_is_asked_for_where_upstream_has_no_function_for_it(argv):
    upstream, keys, parameters = run_rank(_momentum_to_read, argv)
    assert upstream is None, "upstream makes the state of SGD itself now"
    assert keys == parameters


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_momentum_before_the_first_step_changes_no_step(momentum):
    ends = []
    for prepare in (start_momentum, lambda optimizer: None):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, weight_decay=0.1)
        prepare(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
        ends.append((weight.detach(), optimizer.state_dict()["state"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert str(ends[0][1]) == str(ends[1][1])


DENSE: dict[Any, Any]
EXPERTS: dict[Any, Any]
DENSE, EXPERTS = (
    {"optimizer": {"param_groups": [{"is_expert_parallel": experts, "step": 5}]}, "kind": "f"}
    for experts in (False, True)
)
TENSORS: list[dict[Any, Any]] = [{"param_state": "dense"}, {"param_state": "experts"}]


def _steps(state):
    return [group["step"] for group in state["optimizer"]["param_groups"]]


def test_settings_of_two_optimizers_serve_one():
    state = fit_to_chain({0: DENSE, 1: EXPERTS, "param_state": "all"}, 1)
    assert (state["param_state"], state["kind"]) == ("all", "f")
    assert _steps(state) == [5]


def test_settings_of_one_optimizer_serve_two():
    state = fit_to_chain({**DENSE, 0: TENSORS[0], 1: TENSORS[1]}, 2)
    assert [state[i]["param_state"] for i in (0, 1)] == ["dense", "experts"]
    assert _steps(state[0]) == _steps(state[1]) == [5]


def test_settings_that_fit_are_left_alone():
    one = {**DENSE, "param_state": "all"}
    assert fit_to_chain(one, 1) is one
    two = {0: DENSE | TENSORS[0], 1: EXPERTS | TENSORS[1]}
    assert fit_to_chain(two, 2) is two


def _torch_state(optimizers):
    """What is asked for (parameters 0, 1 and the expert 2), and what was saved, without distribution."""
    ids = [[0, 1, 2]] if optimizers == 1 else [[0, 1], [2]]
    asked = [{"state": dict.fromkeys(own, "momentum")} for own in ids]
    saved = [{"state": {"common_step": 3}, "param_groups": [{"lr": 0.5}]} for _ in ids]
    return asked, saved


@pytest.mark.parametrize("copies", [False, True], ids=["fp32", "copies"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_settings_of_torch_fit_another_number_of_optimizers(copies, before, after):
    asked, saved = _torch_state(after)[0], _torch_state(before)[1]
    if copies:
        asked = [{"optimizer": part, "fp32_from_fp16_params": "copies"} for part in asked]
        saved = [{"optimizer": part, "grad_scaler": "scale"} for part in saved]
    merged = (asked[0] if after == 1 else dict(enumerate(asked))) | (
        saved[0] if before == 1 else dict(enumerate(saved))
    )
    state = fit_to_chain(merged, after)
    parts = [state] if after == 1 else [state[0], state[1]]
    for part, own in zip(parts, _torch_state(after)[0], strict=True):
        if copies:
            assert (part["fp32_from_fp16_params"], part["grad_scaler"]) == ("copies", "scale")
            part = part["optimizer"]
        assert part == {
            "state": {**own["state"], "common_step": 3},
            "param_groups": [{"lr": 0.5}],
        }, "the tensors as asked for; the count of steps as it was saved"


def test_still_needed_upstream_takes_settings_as_they_come():
    upstream = ChainedOptimizer.load_state_dict.__wrapped__
    given: list[Any] = []
    one = SimpleNamespace(load_state_dict=given.append)
    upstream(
        SimpleNamespace(chained_optimizers=[one]), {0: DENSE, 1: EXPERTS, "param_state": "all"}
    )
    assert "optimizer" not in given[0]
    with pytest.raises(RuntimeError, match="Expected 2 entries"):
        upstream(
            SimpleNamespace(chained_optimizers=[one, one]), {**DENSE, **dict(enumerate(TENSORS))}
        )


def test_settings_are_this_runs_and_the_step_count_that_of_the_checkpoint():
    own = {"params": ["weight"], "lr": 0.5, "betas": (0.8, 0.9), "bias_correction": True}
    for count, found in ((7.0, 7), (7, 7), (None, None)):
        saved = {"lr": 0.1, "betas": (0.9, 0.95), "amsgrad": False, "step": count}
        (settings,) = settings_of([own], [{"lr": 0.2}, saved])
        assert settings.pop("step", None) == found
        assert settings == {k: v for k, v in own.items() if k != "params"}
    # The kernel of Transformer Engine 2.20 refuses a float, which torch's Adam leaves behind.
    assert type(settings_of([own], [{"step": 7.0}])[0]["step"]) is int


def test_groups_with_the_same_rates_keep_their_parameters():
    groups = [{"params": ["a", "b"], "lr": 0.5}, {"params": ["c"], "lr": 0.5}]
    assert [group["params"] for group in own_groups(groups, [])] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [([], "KeyError"), (["--optimizer", "sgd"], "Could not find parameter group")],
    ids=["adam", "sgd"],
)
def test_still_needed_upstream_finds_no_group_with_another_rate(argv, flags, told):
    with pytest.raises(AssertionError, match=told):
        run_rank(_loaded_by_upstream, [*argv, *flags])


def _loaded_by_upstream(argv):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    upstream: Any = MegatronOptimizer._filter_and_reorder_param_groups
    setattr(MegatronOptimizer, upstream.__name__, staticmethod(upstream.__wrapped__))
    load: Any = DistributedOptimizer.load_state_dict
    setattr(DistributedOptimizer, load.__name__, load.__wrapped__.__wrapped__)
    _, (_, optimizer, _) = megatron_model.set_up(argv)
    state = optimizer.state_dict()
    groups = state.get("optimizer", state)["param_groups"]
    optimizer.load_state_dict(state)
    for group in groups:
        group["max_lr"] = 0.5
    optimizer.load_state_dict(state)


def test_still_needed_upstream_finds_no_scale_where_it_was_constant():
    scaler = DynamicGradScaler(2.0, 1.0, 2.0, 0.5, 1, 1)
    scaler.load_state_dict({})
    assert scaler.scale == 2
    with pytest.raises(KeyError):
        DynamicGradScaler.load_state_dict.__wrapped__(scaler, {})


def test_torchs_adam_goes_on_with_what_a_fused_one_has_left():
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [0], "lr": 0.5, "bias_correction": True, "betas": (0.8, 0.9), "eps": 1e-8}]
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": torch.tensor(7.0)}
    optimizer = torch.optim.AdamW([parameter])
    optimizer.load_state_dict(
        {"state": {0: moments}, "param_groups": [{**groups[0], "weight_decay": 0.0, "step": 7}]}
    )
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 8
