"""What FSDP2 gathers at a time, and that logits are made of trained tokens only."""

import pytest
import torch

from post_training.hf.causal_lm import build_model
from post_training.hf_models.model import unit_classes
from tests.helpers.architectures import tiny
from tests.numerics.architectures import wrapped


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", ["GPT2Block"]),
        ("mamba", ["MambaBlock"]),  # which holds the MambaMixer that it names too
        ("jamba", ["JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"]),
    ],
)
def test_units_are_blocks(family, expected):
    model = build_model(tiny(family))
    assert [kind.__name__ for kind in unit_classes(model)] == expected
    if family == "gpt2":
        model._no_split_modules = None
        assert [kind.__name__ for kind in unit_classes(model)] == expected
        model._no_split_modules = ["GPT2Model", "GPT2Block"]  # one with the embedding
        assert [kind.__name__ for kind in unit_classes(model)] == expected


@pytest.mark.parametrize("family", ["gpt2", "mamba2", "gemma2"])
def test_the_output_layer_sees_trained_tokens_only(family):
    model = wrapped(family)
    seen = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape[-2]))
    chosen = torch.tensor([3, 5, 20])
    for way in ("positions", "rows"):
        with torch.no_grad():
            found = model.packed_logits(way, torch.arange(30), [10, 20], chosen)
        assert found.shape == (3, 391)
        assert sum(seen) == 3  # of rows in two calls
        seen.clear()
