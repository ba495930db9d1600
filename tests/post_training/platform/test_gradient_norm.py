import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from post_training.platform.gradient_norm import BLOCK, l2_norm, scale, sum_of_squares


def exact(tensors):
    return torch.cat([t.flatten().double() for t in tensors]).norm().item()


@pytest.mark.parametrize("sizes", [[1], [BLOCK], [BLOCK - 1, BLOCK + 1], [3, 100_003, 7 * BLOCK]])
def test_norm_is_exact(sizes):
    tensors = [torch.randn(size) for size in sizes]
    found, per_tensor = l2_norm(0, None, [tensors], False)
    assert per_tensor is None and found.shape == (1,) and found.dtype == torch.float32
    assert found.item() == pytest.approx(exact(tensors), rel=1e-7)


def test_sum_of_squares_of_any_shape():
    tensor = torch.randn(33, 65).t()
    assert sum_of_squares(tensor).item() == pytest.approx(
        tensor.double().square().sum().item(), 1e-7
    )


def test_scaling_in_place_and_into_another():
    source, target = torch.randn(5), torch.zeros(5)
    before = source.clone()
    scale(0, None, [[source], [target]], 0.5)
    assert torch.equal(target, before * 0.5) and torch.equal(source, before)
    scale(0, None, [[source], [source]], 0.5)
    assert torch.equal(source, before * 0.5)


def test_megatron_uses_them():
    assert clip_grads.l2_norm_impl is l2_norm and clip_grads.multi_tensor_scale_impl is scale


def test_still_needed_upstream_is_inexact_on_flat_gradients():
    tensor = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    upstream, _ = local_multi_tensor_l2_norm(0, None, [[tensor]], False)
    ours, _ = l2_norm(0, None, [[tensor]], False)
    assert abs(upstream.item() / exact([tensor]) - 1) > 1e-5
    assert ours.item() == pytest.approx(exact([tensor]), rel=1e-7)
