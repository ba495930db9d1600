"""Inputs as a server rounds them are those that were trained with."""

import pytest
import torch

from post_training.export.quantised import Inputs


@pytest.mark.parametrize(("bits", "largest"), [(8, 127.0), ((4, 3), 448.0)])
def test_rounds_as_modelopt_does(bits, largest):
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantiser = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits))
    amax = torch.tensor(1.7)
    quantiser.amax = amax
    # Beyond what was measured, too.
    given = 3 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    server = Inputs(amax / largest, bits == 8)
    server.rounds = True
    (found,) = server(None, (given,))
    # A last bit decides for few.
    assert ((found - quantiser(given)).abs() > 1e-6).float().mean() < 1e-3
