"""Matrices in 4 bits: the nearest level, any cut by rows, and the gradient of what is computed with."""

import pytest
import torch

from post_training.adapters.nf4 import LEVELS, NF4Linear, dequantise, quantise


def test_each_value_is_the_nearest_level_times_the_largest_of_its_block():
    matrix = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    matrix[2, 64:128] = 0.0
    expected = torch.empty_like(matrix)
    for row in range(5):
        for begin in range(0, 192, 64):
            block = matrix[row, begin : begin + 64]
            largest = block.abs().max()
            near = [min(LEVELS.tolist(), key=lambda level: abs(v - level * largest)) for v in block]
            expected[row, begin : begin + 64] = torch.tensor(near) * largest
    packed = quantise(matrix)
    assert packed.dtype == torch.uint8 and packed.numel() == 0.5625 * matrix.numel()
    assert torch.equal(dequantise(packed, 192, torch.float32), expected)
    assert torch.equal(quantise(matrix[1:4]), packed[1:4]) and quantise(matrix[:0]).shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_what_its_bytes_stand_for(dtype):
    """Of columns that are no multiple of 64, too; rounded as the run rounds, where fp32 is compared too."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 8, dtype=dtype)
    layer = NF4Linear(plain)
    layer.weight_nf4.data = layer.pack(plain.weight.detach())
    whole = layer.whole()
    assert whole.weight.dtype == dtype
    layer, whole = layer.float(), whole.float()
    assert 0.05 < (whole.weight - plain.weight).norm() / plain.weight.norm() < 0.12
    x, y = (torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    for out in (layer(x), whole(y)):
        out.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.equal(layer(x), whole(y)) and torch.allclose(x.grad, y.grad, rtol=1e-6)
    assert [p.requires_grad for p in layer.parameters()] == [False, True]
