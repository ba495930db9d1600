"""ModelOpt cuts the scales of a gated layer anew as if its gate and up halves were one matrix.

Upstream: modelopt 0.47, `torch/quantization/plugins/megatron.py`. `_QuantMegatronMLP._modelopt_state_keys`
are patterns for names such as `decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax`, and `_MegatronMLP`
asks `re.match`, which begins at the front of a name: nothing matches, and a checkpoint read with another
tensor parallel size gives rows of the gate the scales of the up projection, without a word.
"""

from __future__ import annotations

from typing import Any

from post_training.platform.patches import in_place_of


def cut_scales_by_halves() -> None:
    """Cut them by halves; once ModelOpt is needed, before a quantised model is saved or loaded."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from modelopt.torch.quantization.plugins.megatron import _QuantMegatronMLP

    if hasattr(_QuantMegatronMLP.sharded_state_dict, "__wrapped__"):
        return

    @in_place_of((_QuantMegatronMLP, "sharded_state_dict"))
    def by_halves(
        original: Any, mlp: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        state = original(mlp, prefix, sharded_offsets, metadata)
        if not mlp.config.gated_linear_unit:
            return state
        for name, part in state.items():
            scale = name.removeprefix(prefix) == "linear_fc1.weight_quantizer._amax"
            if scale and part.local_shape and part.local_shape[0] > 1:  # one scale has no halves
                state[name] = apply_swiglu_sharded_factory(part, sharded_offsets, True)
        return state
