"""That steps and evaluations are reported with the right numbers is in `tests/runs/test_finetune.py`."""

import inspect

import pytest
from megatron.core.optimizer.optimizer import ChainedOptimizer
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
    train = list(inspect.signature(training.train.__wrapped__).parameters)
    assert train[:5] == [
        *("forward_step_func", "model", "optimizer", "opt_param_scheduler", "train_data_iterator")
    ]
    train_step = list(inspect.signature(training.train_step.__wrapped__).parameters)
    assert train_step[:4] == ["forward_step_func", "data_iterator", "model", "optimizer"]
    save = list(inspect.signature(training.save_checkpoint_and_time.__wrapped__).parameters)
    assert save[0] == "iteration"
    assert list(inspect.signature(training.dummy_train_step.__wrapped__).parameters) == [
        "data_iterator"
    ]


def test_the_gradient_norm_is_told_before_the_optimizer_steps():
    """And by what every optimizer of a run is wrapped in."""
    step = inspect.getsource(ChainedOptimizer.step)
    assert step.count("self.get_grad_norm()") == 1
    assert step.index("self.get_grad_norm()") < step.index("clip_grad_by_total_norm_fp32")
    assert step.index("self.get_grad_norm()") < step.index("step_with_ready_grads()")


def test_still_needed_upstream_logs_the_next_learning_rate():
    """The schedule steps in `train_step`; the rate to log is read after it."""
    assert "opt_param_scheduler.step(" in inspect.getsource(training.train_step.__wrapped__)
    train = inspect.getsource(training.train.__wrapped__)
    assert train.index("= train_step(") < train.index("= get_canonical_lr_for_logging(")


def test_still_needed_upstream_passes_over_its_own_fields_only():
    """Such as `tokens`, which our micro batches do not have."""
    source = inspect.getsource(training.dummy_train_step.__wrapped__)
    assert "BATCH_KEYS" in source and "get_batch_on_this_tp_rank" in source


def test_data_of_a_skipped_step_is_passed_over(monkeypatch):
    monkeypatch.setattr(training, "get_num_microbatches", lambda: 3)
    first, second = iter(range(10)), iter(range(10))
    training.dummy_train_step(first)
    assert next(first) == 3
    training.dummy_train_step([first, second])
    assert (next(first), next(second)) == (7, 3)
    training.dummy_train_step(None)  # another rank reads the data


def test_a_split_without_data_is_not_evaluated(heard):
    assert training.evaluate_and_print_results("on test set", None, None, None, 7) is None
    assert heard == []


def test_still_needed_upstream_has_no_callbacks():
    names = set(inspect.signature(training.pretrain).parameters)
    assert not {name for name in names if "callback" in name or "hook" in name}
