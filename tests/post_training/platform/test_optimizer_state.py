"""That a resumed run continues bit for bit is in `tests/test_finetune.py`."""

import pytest

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
