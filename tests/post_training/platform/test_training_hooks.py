"""That steps and evaluations are reported with the right numbers is in `tests/test_finetune.py`."""

import inspect

import pytest
from megatron.training import training

from post_training.platform.training_hooks import hooks


@pytest.fixture
def heard(monkeypatch):
    told: list[object] = []
    monkeypatch.setattr(hooks, "on_step", [told.append])
    monkeypatch.setattr(hooks, "on_evaluation_start", [told.append])
    monkeypatch.setattr(hooks, "on_evaluation_end", [told.append])
    monkeypatch.setattr(hooks, "evaluation_iterations", {"valid": 3})
    return told


def test_upstream_passes_what_the_hooks_read():
    """The wrappers rely on names and order of these parameters."""
    log = list(inspect.signature(training.training_log.__wrapped__).parameters)
    assert log[:8] == [
        *("loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale"),
        *("report_memory_flag", "skipped_iter", "grad_norm"),
    ]
    evaluate = list(inspect.signature(training.evaluate_and_print_results.__wrapped__).parameters)
    assert evaluate[:5] == ["prefix", "forward_step_func", "data_iterator", "model", "iteration"]
    assert "eval_iters" in inspect.signature(training.evaluate.__wrapped__).parameters


def test_a_split_without_data_is_not_evaluated(heard):
    assert training.evaluate_and_print_results("on test set", None, None, None, 7) is None
    assert heard == []


def test_still_needed_upstream_has_no_callbacks():
    names = set(inspect.signature(training.pretrain).parameters)
    assert not {name for name in names if "callback" in name or "hook" in name}
