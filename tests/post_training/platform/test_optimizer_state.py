"""That a resumed run continues bit for bit is in `tests/test_finetune.py`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from post_training.platform.optimizer_state import fit_to_chain, start_momentum
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


def _groups(state):
    # As upstream looks them up: later ones win.
    return {g["is_expert_parallel"]: g["step"] for g in state["optimizer"]["param_groups"]}


def test_settings_of_two_optimizers_serve_one():
    state = fit_to_chain({0: DENSE, 1: EXPERTS, "param_state": "all"}, 1)
    assert (state["param_state"], state["kind"]) == ("all", "f")
    assert _groups(state)[False] == 5


def test_settings_of_one_optimizer_serve_two():
    state = fit_to_chain({**DENSE, 0: TENSORS[0], 1: TENSORS[1]}, 2)
    assert [state[i]["param_state"] for i in (0, 1)] == ["dense", "experts"]
    assert _groups(state[0])[False] == _groups(state[1])[True] == 5


def test_settings_that_fit_are_left_alone():
    one = {**DENSE, "param_state": "all"}
    assert fit_to_chain(one, 1) is one
    two = {0: DENSE | TENSORS[0], 1: EXPERTS | TENSORS[1]}
    assert fit_to_chain(two, 2) is two


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
