"""That scales go with their rows is in `tests/numerics/test_quantised.py`."""

import re


def test_still_needed_upstream_patterns_match_no_name():
    from modelopt.torch.quantization.plugins.megatron import _QuantMegatronMLP

    name = "decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"
    patterns = _QuantMegatronMLP._modelopt_state_keys
    assert any(re.search(pattern, name) for pattern in patterns)
    assert not any(re.match(pattern, name) for pattern in patterns)
