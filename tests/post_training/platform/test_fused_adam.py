import pytest

from tests.helpers import megatron_model
from tests.helpers.launch import run_rank


def _kernels(argv, patched):
    from megatron.core import optimizer as module

    name = "_get_megatron_optimizer_based_on_param_groups"
    if not patched:
        setattr(module, name, getattr(module, name).__wrapped__)
    _, (_, optimizer, _) = megatron_model.set_up(argv)
    (inner,) = (each.optimizer for each in optimizer.chained_optimizers)
    return [bool(group["fused"]) for group in inner.param_groups]


@pytest.fixture
def argv(hf_model, tmp_path):
    return megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))


def test_adam_takes_the_fused_kernel(argv):
    kernels = run_rank(_kernels, argv, True)
    assert kernels and all(kernels)


def test_still_needed_upstream_takes_the_default_of_torch(argv):
    assert not any(run_rank(_kernels, argv, False))


def test_other_optimizers_are_left_alone(argv):
    # torch's SGD has a fused kernel too, but its state is another's business.
    assert not any(run_rank(_kernels, [*argv, "--optimizer", "sgd"], True))
