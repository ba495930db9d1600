"""That drafts are built from these parts and equal EAGLE-3 is in `distillation/test_draft_forward.py`."""

import pytest
import torch

from post_training.platform.modelopt_eagle import DuplicatedLinear, built_from


def test_names_are_given_back_whatever_happens():
    from modelopt.torch.speculative.plugins import megatron_eagle as upstream

    names = ("TENorm", "TELinear", "EagleTransformerBlock", "get_gpt_modelopt_spec")
    before = [getattr(upstream, name) for name in names]
    with pytest.raises(KeyError), built_from(torch.nn.LayerNorm, lambda config: None):
        assert upstream.TENorm is torch.nn.LayerNorm and upstream.TELinear is DuplicatedLinear
        raise KeyError
    assert [getattr(upstream, name) for name in names] == before


def test_still_needed_upstream_names_transformer_engine():
    from megatron.core.extensions import transformer_engine
    from modelopt.torch.speculative.plugins import megatron_eagle as upstream

    assert upstream.TENorm is transformer_engine.TENorm
    assert upstream.TELinear is transformer_engine.TELinear
