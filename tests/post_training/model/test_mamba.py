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
