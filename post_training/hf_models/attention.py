"""Attention document by document, as a function that `transformers` models can be told to use.

`transformers` hands it queries, keys and values of one row; where documents begin it does not say, so the
module is asked (`packing.Documents`). Cost grows with the sum of squared document lengths, not with the
square of the row. On CUDA in bf16 one kernel computes all documents of a row, where it can.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# `transformers` looks for "sdpa", "flash" and "flex_attention" inside such names.
NAME = "packed_documents"


def register() -> None:
    """Make the function known to `transformers`, and that it needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_documents)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def packed_documents(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention in which no document sees another.

    Args:
        module: the attention layer.
        query: [rows, heads, tokens, head_dim].
        key: [rows, key/value heads, tokens, head_dim].
        value: like `key`, perhaps of another head size.
        attention_mask: None; documents and causality are all there is.
        scaling: of the scores; None: by the root of the head size.
        dropout: is 0, see `hf/causal_lm.py`.
        sliding_window: tokens that a query looks back, itself among them.
        softcap: limit of the scores, by a hyperbolic tangent.
        s_aux: a score for each head to which no value belongs (attention sink): [heads].
        is_causal: as the layer wants it.
        more: what `transformers` hands through.

    Returns:
        [rows, tokens, heads, head_dim of values], and no weights.

    Raises:
        ValueError: it is asked for what this function does not do.
    """
    documents = module.packed_documents
    documents.calls += 1
    unknown = [
        name for name, given in more.items() if isinstance(given, Tensor) and name in _BIASES
    ]
    if unknown or attention_mask is not None or is_causal is False or dropout:
        raise ValueError(f"attention of {type(module).__name__} is more than causal: {unknown}")
    lengths, window = _seen(module, documents.lengths or [query.shape[2]], sliding_window)
    if softcap is None and s_aux is None and _kernel_takes(query):
        bounds = documents.bounds(lengths, query.device)
        return _varlen(query, key, value, bounds, max(lengths), window, scaling), None
    groups = query.shape[1] // key.shape[1]
    parts = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        if softcap is None and s_aux is None:
            parts.append(_fused(q, k, v, window, scaling))
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            parts.append(_written_out(q, k, v, window, scaling, softcap, s_aux))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


_BIASES = ("position_bias", "attention_bias", "alibi", "score_mod")


def _seen(module: Any, lengths: list[int], window: int | None) -> tuple[list[int], int | None]:
    """Pieces of the row that see only themselves, and how far back a token looks in them.

    A layer of chunked attention, or of a window, may leave that to the mask that it is not given.
    """
    config: Any = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds is not None and index is not None else None
    if kind == "chunked_attention":
        chunk: int = config.attention_chunk_size
        return [min(chunk, n - at) for n in lengths for at in range(0, n, chunk)], window
    if kind == "sliding_attention" and window is None:
        window = getattr(config, "sliding_window", None)
    return lengths, window


def _kernel_takes(query: Tensor) -> bool:
    """Whether torch's variable-length flash kernel, of this release, computes such a row."""
    if not query.is_cuda or query.dtype == torch.float32:
        return False
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    fits = {"scale", "window_size", "enable_gqa"} <= takes.keys()
    fits &= query.shape[0] == 1 and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    return fits


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """All documents of a row by one kernel: [1, tokens, heads, head_dim of values].

    Args:
        query: as of `packed_documents`, like all others.
        key: likewise.
        value: likewise.
        bounds: where documents begin, and the end of the last: int32 [documents + 1].
        longest: tokens of a document.
        window: likewise.
        scaling: likewise.
    """
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[3]
    value = F.pad(value, (0, key.shape[3] - width))  # the kernel knows one size
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    out: Any = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.narrow(out, -1, 0, width).unsqueeze(0)


def _mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """What a query may see: bool [length, length]."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril().triu(1 - window)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None
) -> Tensor:
    """Attention of one document by torch's kernels."""
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        mask = _mask(length, window, query.device)
    if query.shape[1] != key.shape[1] and query.is_cuda:
        # On CUDA only the flash kernel takes grouped heads, in bf16, without a mask and of few sizes.
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with soft caps and sinks, which the kernels do not know."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~_mask(query.shape[2], window, query.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[2]] @ value
