from types import SimpleNamespace

import pytest
import torch

from post_training.model.norm import LocalNorm


def make(normalization, eps=1e-5, **options):
    config = SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=options.pop("zero_centred", False),
        sequence_parallel=options.pop("sequence_parallel", False),
    )
    return LocalNorm(config=config, hidden_size=16, eps=eps)


def test_rms_norm():
    norm = make("RMSNorm", eps=0.5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 2, 16, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_layer_norm():
    norm = make("LayerNorm", eps=0.5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 2, 16, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    expected = expected * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weights_are_marked_for_sequence_parallelism(sequence_parallel):
    for kind in ("RMSNorm", "LayerNorm"):
        norm = make(kind, sequence_parallel=sequence_parallel)
        assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="L2Norm"):
        make("L2Norm")
    with pytest.raises(ValueError, match="transformer_engine"):
        make("RMSNorm", zero_centred=True)
