"""The norm of the local layer spec: torch's own, usable with sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalNorm:
    """Builds `torch.nn.RMSNorm` or `torch.nn.LayerNorm` from a `TransformerConfig`.

    Megatron's `WrappedTorchNorm` refuses sequence parallelism, although a norm works on each token
    alone: all it needs is that gradients of its weights are summed over the tensor parallel group,
    which Megatron does for parameters marked `sequence_parallel`.
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        **unused: object,
    ) -> torch.nn.Module:
        """Build the norm over the last dimension of size `hidden_size`.

        Raises:
            ValueError: the configuration asks for another norm, or for zero-centred weights.
        """
        if config.layernorm_zero_centered_gamma:
            raise ValueError("zero-centred norm weights need --transformer-impl transformer_engine")
        norm: torch.nn.Module
        if config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        elif config.normalization == "LayerNorm":
            norm = torch.nn.LayerNorm(hidden_size, eps=eps)
        else:
            raise ValueError(f"normalization {config.normalization!r} is not RMSNorm or LayerNorm")
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class LatentNorm(LocalNorm):
    """The norm of a latent vector: `transformers` gives it this epsilon, whatever `rms_norm_eps` says."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, **unused: object
    ) -> torch.nn.Module:
        """Build the norm over the last dimension of size `hidden_size`."""
        return LocalNorm(config, hidden_size, eps=1e-6)
