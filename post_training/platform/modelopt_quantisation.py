"""ModelOpt cuts the scales of a gated layer anew as if its gate and up halves were one matrix.

Upstream: modelopt 0.47, `torch/quantization/plugins/megatron.py`. `_QuantMegatronMLP._modelopt_state_keys`
are patterns for names such as `decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax`, and `_MegatronMLP`
asks `re.match`, which begins at the front of a name: nothing matches, and a checkpoint read with another
tensor parallel size gives rows of the gate the scales of the up projection, without a word.
"""

from __future__ import annotations


def apply() -> None:
    """Let the patterns begin anywhere; after ModelOpt was imported, before a quantised model is saved."""
    from modelopt.torch.quantization.plugins import megatron

    mended = [
        f".*{key.removeprefix('.*')}" for key in megatron._QuantMegatronMLP._modelopt_state_keys
    ]
    megatron._QuantMegatronMLP._modelopt_state_keys = mended
