"""That scales go with their rows and experts is in `tests/numerics/test_quantised.py`."""

import inspect
import re


def test_still_needed_upstream_patterns_match_no_name():
    from modelopt.torch.quantization.plugins.megatron import _QuantMegatronMLP

    name = "decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"
    patterns = _QuantMegatronMLP._modelopt_state_keys
    assert any(re.search(pattern, name) for pattern in patterns)
    assert not any(re.match(pattern, name) for pattern in patterns)


def test_still_needed_upstream_leaves_shared_experts_alone():
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    assert MLP in QuantModuleRegistry and SharedExpertMLP not in QuantModuleRegistry


def test_still_needed_upstream_refuses_experts_over_both():
    from modelopt.torch.quantization.plugins.megatron import (
        _MegatronParallelLinear,
        _MegatronSequentialMLP,
    )

    assert "TP+EP is not supported" in inspect.getsource(_MegatronSequentialMLP._setup)
    assert "tp_group" not in inspect.getsource(_MegatronParallelLinear.sharded_state_dict)
