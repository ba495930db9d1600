"""That a resumed run continues bit for bit is in `tests/numerics/test_fsdp2.py`."""

import inspect

import pytest
import torch

from post_training.platform.checkpoints.torch_dcp import initialise


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adam", "sgd"],
)
def test_a_new_optimizer_gets_its_state_and_changes_nothing(make):
    parameter = torch.nn.Parameter(torch.randn(4))
    before = parameter.detach().clone()
    optimizer = make([parameter])
    initialise(optimizer)
    assert parameter.equal(before) and parameter.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.1
    state = optimizer.state[parameter]
    assert state and {"exp_avg", "momentum_buffer"} & state.keys()
    # One that has trained keeps what it has.
    parameter.grad = torch.ones(4)
    optimizer.step()
    kept = {name: value.clone() for name, value in state.items()}
    initialise(optimizer)
    assert all(state[name].equal(value) for name, value in kept.items())


def test_wrapper_is_in_place():
    from megatron.training import training
    from megatron.training.models import dist_utils

    from post_training.platform.fsdp2 import FullyShardedModel

    assert dist_utils.TorchFullyShardedDataParallel is FullyShardedModel
    assert training.torch_FSDP is FullyShardedModel


def test_still_needed_upstream_neither_sums_nor_scales_gradients():
    from megatron.core.distributed import TorchFullyShardedDataParallel
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel

    upstream = TorchFullyShardedDataParallel
    assert upstream.scale_gradients is _BaseDataParallel.scale_gradients
    source = inspect.getsource(upstream)
    assert "divide_factor" not in source and "mp_policy" not in source


def test_still_needed_upstream_cannot_load_into_its_optimizers():
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
    from megatron.training import checkpointing

    source = inspect.getsource(inspect.unwrap(checkpointing.load_checkpoint))
    assert "optimizer.state_dict(is_loading=True)" in source
    for owner in (ChainedOptimizer, FP32Optimizer):
        assert "is_loading" not in inspect.signature(owner.state_dict).parameters


def test_still_needed_upstream_refuses_tied_embeddings():
    """`post_training.arguments.parser.validate` goes round it."""
    from megatron.training import arguments

    message = "--use-torch-fsdp2 requires --untie-embeddings-and-output-weights"
    assert message in inspect.getsource(arguments.validate_args)
