import sys
import types
from typing import Any

import torch

from post_training.model.mamba import CHUNK, scan


def _inputs(tokens, heads=4, groups=2, head_dim=3, state=5):
    torch.manual_seed(0)
    x = torch.randn(1, tokens, heads, head_dim, dtype=torch.float64)
    steps = torch.rand(1, tokens, heads, dtype=torch.float64)
    rates = -torch.rand(heads, dtype=torch.float64) - 0.1
    b, c = (torch.randn(1, tokens, groups, state, dtype=torch.float64) for _ in range(2))
    return x, steps, rates, b, c


def test_scan_is_the_recurrence_token_by_token():
    x, steps, rates, b, c = _inputs(2 * CHUNK + 7)
    wide_b, wide_c = (t.repeat_interleave(2, dim=2) for t in (b, c))
    state, expected = torch.zeros(1, 4, 3, 5, dtype=torch.float64), []
    for t in range(x.shape[1]):
        decay = (steps[:, t] * rates).exp()[..., None, None]
        added = (steps[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * wide_b[:, t].unsqueeze(2)
        state = state * decay + added
        expected.append((state * wide_c[:, t].unsqueeze(2)).sum(-1))
    y, last = scan(x, steps, rates, b, c)
    assert torch.allclose(y, torch.stack(expected, dim=1), rtol=1e-10, atol=1e-10)
    assert torch.allclose(last, state, rtol=1e-10, atol=1e-10)


def test_scan_goes_on_from_a_state():
    x, steps, rates, b, c = _inputs(60)
    whole, _ = scan(x, steps, rates, b, c)
    _, state = scan(x[:, :25], steps[:, :25], rates, b[:, :25], c[:, :25])
    rest, _ = scan(x[:, 25:], steps[:, 25:], rates, b[:, 25:], c[:, 25:], state)
    assert torch.allclose(rest, whole[:, 25:], rtol=1e-10, atol=1e-10)


class OnDevice(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


def test_on_cuda_the_kernel_of_mamba_ssm_is_called_as_it_reads(monkeypatch):
    """A double with the signature of state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py."""

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
        seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    ):  # fmt: skip
        assert not dt_softplus and D is None is z is dt_bias is seq_idx
        assert x.stride(-1) == B.stride(-1) == C.stride(-1) == 1 and chunk_size == CHUNK
        found = scan(x.as_subclass(torch.Tensor), dt, A, B, C, initial_states)
        return found if return_final_states else found[0]

    module: Any = types.SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
    x, steps, rates, b, c = _inputs(60)
    whole, last = scan(x, steps, rates, b, c)
    _, state = scan(x[:, :25], steps[:, :25], rates, b[:, :25], c[:, :25])
    for first, given in ((0, None), (25, state)):
        x_, steps_, b_, c_ = (t[:, first:] for t in (x, steps, b, c))
        y, found = scan(x_.as_subclass(OnDevice), steps_, rates, b_, c_, given)
        assert torch.allclose(y, whole[:, first:]) and torch.allclose(found, last)
