"""The bias of an expert's second matrix is its own, and may be added in place.

Upstream: megatron-core 0.19.2, `core/tensor_parallel/layers.py`: `RowParallelLinear` marks the bias as one
of sequence parallelism, with experts too. So `_allreduce_non_tensor_model_parallel_grads` adds up gradients
over the tensor parallel group, whose ranks hold different experts under expert parallelism: they are wrong
by up to ten times their norm. Without expert parallelism
the layer's output is a view that autograd does not let `MLP.forward` add the bias to (`output += ...`).

`core/optimizer/__init__.py`: biases do not decay, which it tells by `.bias` and one dimension;
`transformers` stacks those of all experts in one matrix (`gate_up_proj_bias`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from post_training.platform.patches import in_place_of


def apply() -> None:
    """Mend layers of experts whose tensor parallel size is 1, the only one for which biases work."""
    from megatron.core.optimizer import ParamGroupOverride
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.core.tensor_parallel import layers

    @in_place_of((layers.RowParallelLinear, "__init__"))
    def _built(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
        original(layer, *args, **kwargs)
        if layer.is_expert and layer.bias is not None and layer.tp_group.size() == 1:
            layer.bias.sequence_parallel = False
            # The dispatcher does what crosses ranks: the product is left as it is, no view.
            layer.explicit_expert_comm = True

    from megatron.training import training

    @in_place_of((training, "get_standard_config_overrides"))
    def _overrides(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return {
            **original(*args, **kwargs),
            ParamKey(name="*_bias"): ParamGroupOverride(wd_mult=0.0),
        }
