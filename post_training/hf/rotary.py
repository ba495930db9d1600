"""Rotary frequencies of a HuggingFace configuration; some depend on the length of a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from post_training.errors import SetupError
from post_training.hf.families import family_of, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary parameters of a configuration (transformers 5 keeps them in one dictionary)."""
    return dict(getattr(config, "rope_parameters", None) or {})


def rotary_share(config: PretrainedConfig) -> float:
    """How much of a head is turned, from its first number on."""
    return float(rope_parameters(config).get("partial_rotary_factor", 1.0))


def _rotary_dim(config: PretrainedConfig) -> int:
    return int(head_dim(config) * rotary_share(config))


def inverse_frequencies(config: PretrainedConfig, length: int | None = None) -> Tensor:
    """Inverse frequencies of the rotary embedding, as `transformers` computes them.

    Args:
        config: one that has been checked.
        length: tokens of the document, for `dynamic` and `longrope`; None for a short one.

    Returns:
        float32 [turned numbers of a head / 2].
    """
    return _computed(config, length)[0]


def _computed(config: PretrainedConfig, length: int | None) -> tuple[Tensor, float]:
    """Inverse frequencies, and the factor of cosine and sine."""
    rope_type = rope_parameters(config).get("rope_type", "default")
    if rope_type == "default":
        dim = _rotary_dim(config)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
        return 1.0 / (float(rope_parameters(config)["rope_theta"]) ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    device = torch.device("cpu")
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, device, seq_len=length)
    return frequencies.to(torch.float32), float(factor)


@dataclass(frozen=True)
class RotaryScaling:
    """The rotary embedding of a model.

    `transformers` chooses the frequencies of `dynamic` and `longrope` by the largest position of a call:
    for a document that is computed alone, by its length. (With `dynamic` it also remembers a longer call
    before; a document's numbers must not depend on that, so here every document is the first.)
    """

    inv_freq: Tensor
    """Of documents up to `original_length`: float32 [turned numbers of a head / 2]."""
    attention_factor: float = 1.0
    """Factor of cosine and sine."""
    original_length: int | None = None
    """Longer documents have frequencies by their length; None where these never depend on it."""
    long_inv_freq: Tensor | None = None
    """`longrope`: of all longer documents, float32 [head_dim / 2]."""
    base: float = 0.0
    """`dynamic`: rope_theta."""
    factor: float = 1.0
    """`dynamic`: the factor that config.json names."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> RotaryScaling:
        """That of a configuration that has been checked."""
        parameters = rope_parameters(config)
        rope_type = parameters.get("rope_type", "default")
        inv_freq, attention_factor = _computed(config, None)
        if rope_type == "longrope":
            original = int(parameters["original_max_position_embeddings"])
            longer = inverse_frequencies(config, original + 1)
            return cls(inv_freq, attention_factor, original, long_inv_freq=longer)
        if rope_type == "dynamic":
            # Not original_max_position_embeddings: transformers heeds that in no model of these families.
            original = int(config.max_position_embeddings)
            base, factor = float(parameters["rope_theta"]), float(parameters["factor"])
            return cls(inv_freq, attention_factor, original, base=base, factor=factor)
        return cls(inv_freq, attention_factor)

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Inverse frequencies by the length of the document; no device is waited for.

        Args:
            lengths: tokens of each token's document: int64 [tokens].

        Returns:
            float32 [tokens, head_dim / 2].
        """
        assert self.original_length is not None
        short = self.inv_freq.to(lengths.device)
        beyond = (lengths > self.original_length).unsqueeze(1)
        if self.long_inv_freq is not None:
            return torch.where(beyond, self.long_inv_freq.to(lengths.device), short)
        # The formula of transformers' `_compute_dynamic_ntk_parameters`, for many lengths at once.
        dim = 2 * len(short)
        stretch = self.factor * lengths / self.original_length - (self.factor - 1)
        bases = self.base * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=lengths.device).float() / dim
        return torch.where(beyond, 1.0 / bases.unsqueeze(1) ** exponents, short)


def check_rotary(config: PretrainedConfig, name: str) -> None:
    """Refuse rotary embeddings that cannot be computed.

    Raises:
        SetupError: naming the parameter of config.json.
    """
    parameters = rope_parameters(config)
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise SetupError(
            f"--hf-model {name}: rope type {rope_type} is not supported; "
            f"these are: {', '.join(ROPE_TYPES)}"
        )
    share = parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and not family_of(config).partial_rotary:
        raise SetupError(f"--hf-model {name}: partial rotary embeddings are not supported")
    known = isinstance(share, (int, float)) and 0 < share <= 1
    if not known or _rotary_dim(config) % 2 or not _rotary_dim(config):
        raise SetupError(
            f"--hf-model {name}: config.json says partial_rotary_factor {share!r}, expected a number above "
            f"0 and at most 1 that gives an even part of the head's size {head_dim(config)}"
        )
    half = _rotary_dim(config) // 2
    for key in ("short_factor", "long_factor") if rope_type == "longrope" else ():
        found = parameters.get(key)
        if not isinstance(found, list) or len(found) != half:
            count = len(found) if isinstance(found, list) else found
            raise SetupError(
                f"--hf-model {name}: rope type longrope needs {half} numbers as {key}, half of the head's "
                f"size; config.json has {count}"
            )
    try:
        scaling = RotaryScaling.of(config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise SetupError(
            f"--hf-model {name}: rope type {rope_type} cannot be computed ({reason})"
        ) from error
    both = (scaling.inv_freq, scaling.long_inv_freq)
    if not all(bool(torch.isfinite(part).all()) for part in both if part is not None):
        raise SetupError(f"--hf-model {name}: rope type {rope_type} gives frequencies not finite")
