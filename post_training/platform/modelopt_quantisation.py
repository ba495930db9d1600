"""How ModelOpt cuts the scales of a quantised model for a checkpoint.

Upstream: modelopt 0.47, `torch/quantization/plugins/megatron.py`.

`_QuantMegatronMLP._modelopt_state_keys` are patterns for names such as
`decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax`, and `_MegatronMLP` asks `re.match`, which
begins at the front of a name: nothing matches, and a checkpoint read with another tensor parallel
size gives rows of the gate the scales of the up projection, without a word. What shared experts are
(`SharedExpertMLP`) is no `_QuantMegatronMLP` at all.

Scales of experts are cut over the tensor parallel ranks of attention, not over the experts' own:
where these are others, nothing can be saved. `_MegatronSequentialMLP` refuses expert beside tensor
parallelism for that.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from post_training.platform.patches import in_place_of


def mend_scales() -> None:
    """Cut them as the weights they belong to; called before a model is quantised or loaded."""
    from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
    from modelopt.torch.quantization.plugins import megatron as plugin

    if hasattr(MLP.sharded_state_dict, "__wrapped__"):
        return

    @in_place_of((MLP, "sharded_state_dict"))
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

    sharded = plugin.make_sharded_tensors_for_checkpoint

    @in_place_of((plugin._MegatronParallelLinear, "sharded_state_dict"))
    def over_own_ranks(
        original: Any,
        linear: Any,
        prefix: str = "",
        sharded_offsets: Any = (),
        metadata: Any = None,
    ) -> Any:
        metadata = plugin.ensure_metadata_has_dp_cp_group(metadata)
        plugin.make_sharded_tensors_for_checkpoint = partial(
            sharded, tp_group=linear.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        try:
            return original(linear, prefix, sharded_offsets, metadata)
        finally:
            plugin.make_sharded_tensors_for_checkpoint = sharded

    @in_place_of((plugin._MegatronSequentialMLP, "_setup"))
    def over_both(original: Any, experts: Any) -> None:
        config = experts.config
        experts.config = SimpleNamespace(expert_model_parallel_size=1, tensor_model_parallel_size=1)
        original(experts)
        experts.config = config
