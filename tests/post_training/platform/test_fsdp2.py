from typing import Any

import pytest
import torch

from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks


@pytest.fixture
def argv(hf_model, tmp_path):
    words = megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))
    return [*words, "--use-torch-fsdp2"]


def _linear(world_size_flags, per_token):
    """Gradient of a sharded matrix whose loss on rank r is (r + 1) times the sum of its elements."""
    import dataclasses

    from post_training.platform.fsdp2 import FullyShardedModel

    _, (chunks, _, _) = megatron_model.set_up(world_size_flags)
    config = dataclasses.replace(chunks[0].config, calculate_per_token_loss=per_token)
    matrix = torch.nn.Linear(4, 4, bias=False)
    sharded = FullyShardedModel(config, chunks[0].ddp_config, matrix)
    for _ in range(2):  # micro batches
        (sharded(torch.eye(4)).sum() * (megatron_model.rank() + 1)).backward()
    gradient: Any = matrix.weight.grad
    before = gradient.full_tensor()
    sharded.scale_gradients(torch.tensor([0.5]))
    return before, gradient.full_tensor()


@pytest.mark.slow
@pytest.mark.parametrize(("per_token", "expected"), [(True, 2 * 3.0), (False, 2 * 1.5)])
def test_gradients_are_summed_for_a_loss_by_token_and_scaled(argv, per_token, expected):
    """Upstream averages them over ranks and never divides them by the tokens."""
    for before, after in run_ranks(_linear, 2, argv, per_token):
        torch.testing.assert_close(before, torch.full((4, 4), expected))
        torch.testing.assert_close(after, torch.full((4, 4), expected / 2))


def _units(argv):
    from torch.distributed.fsdp import FSDPModule

    _, (chunks, _, _) = megatron_model.set_up(argv)
    return [name for name, part in chunks[0].module.named_modules() if isinstance(part, FSDPModule)]


@pytest.mark.parametrize("tied", [False, True])
def test_units(hf_model, tmp_path, tied):
    words = megatron_model.flags(str(hf_model("qwen3", tied=tied)), str(tmp_path / "out"))
    found = run_rank(_units, [*words, "--use-torch-fsdp2"])
    layers = ["decoder.layers.0", "decoder.layers.1"]
    # Tied weights belong to the root, "", which is whole from the embedding to the output layer.
    assert found == ["", *([] if tied else ["embedding"]), *layers]


def _precision(argv):
    """Dtypes of shards, gradients and moments, of a layer's computation, and of its rotary angles."""
    args, (chunks, optimizer, _) = megatron_model.set_up(argv)
    (model,) = chunks
    seen = {}

    def look(module, positional, named):
        seen["hidden"] = named["hidden_states"].dtype
        seen["angles"] = named["rotary_pos_emb"].dtype
        seen["weight"] = module.mlp.linear_fc2.weight.dtype

    model.module.decoder.layers[1].register_forward_pre_hook(look, with_kwargs=True)
    row = torch.arange(16).unsqueeze(0)
    model(row, row, None).float().sum().backward()
    parameters = list(model.module.parameters())
    seen["shards"] = {p.dtype for p in parameters}
    seen["gradients"] = {p.grad.dtype for p in parameters}
    optimizer.step()
    seen["moments"] = {
        state["exp_avg"].dtype
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    }
    return seen


def test_bf16_computes_on_fp32_shards(argv):
    """Upstream accumulates gradients in bf16, the dtype of its weights."""
    found = run_rank(_precision, [*argv, "--bf16"])
    assert found["hidden"] is torch.bfloat16
    assert found["angles"] is torch.float32, "positions of a long document need all of fp32"
    for what in ("shards", "gradients", "moments"):
        assert found[what] == {torch.float32}
