"""ModelOpt builds its EAGLE module from Transformer Engine's norms and linear layers only.

Upstream: modelopt 0.47, `torch/speculative/plugins/megatron_eagle.py` names `TENorm`, `TELinear` and a spec
with TE's attention, which do not exist on a CPU and refuse packed documents everywhere. While a model is
converted these names stand for layers of this project; nothing is replaced afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class DuplicatedLinear(torch.nn.Module):
    """What `TELinear` with `parallel_mode="duplicated"` is: every tensor parallel rank holds it whole."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, bias: bool, **unused: Any
    ) -> None:
        """Take the arguments that ModelOpt gives.

        Raises:
            ValueError: a bias is asked for.
        """
        super().__init__()
        if bias:
            raise ValueError("the draft's input layer has no bias")
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        # With sequence parallelism each rank sees a part of the tokens: Megatron sums such gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input size] to [..., output size], and no bias, as Megatron's layers answer."""
        return torch.nn.functional.linear(x, self.weight), None


@contextlib.contextmanager
def built_from(norm: type, layer_spec: Callable[[Any], Any]) -> Iterator[None]:
    """Let ModelOpt build EAGLE modules from other parts.

    Args:
        norm: a class with the arguments of `TENorm`.
        layer_spec: from the draft's `TransformerConfig` to the spec of its decoder block.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from modelopt.torch.speculative.plugins import megatron_eagle as upstream

    block = upstream.EagleTransformerBlock

    def with_norm(*, spec: Any, **options: Any) -> torch.nn.Module:
        # A spec of one layer says nothing of the norm behind the last.
        whole = TransformerBlockSubmodules(layer_specs=[spec], layer_norm=norm)
        built: torch.nn.Module = block(spec=whole, **options)
        return built

    own = {
        "EagleTransformerBlock": with_norm,
        "TENorm": norm,
        "TELinear": DuplicatedLinear,
        "get_gpt_modelopt_spec": lambda config, **unused: layer_spec(config),
    }
    before = {name: getattr(upstream, name) for name in own}
    try:
        for name, part in own.items():
            setattr(upstream, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(upstream, name, part)
