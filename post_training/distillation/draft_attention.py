"""Attention of the later test-time steps of an EAGLE-3 draft, document by document.

When a server drafts, the t-th token it drafts behind position q sees the keys that were computed from the
base model's features up to q, and those of the t - 1 drafts in between. In training all q do so at once
(the figure is of one document, step 2; `.` is not seen):

    keys of step 0        of step 1    of step 2
    q = 0   x . . .       x . . .      x . . .
    q = 1   x x . .       . x . .      . x . .
    q = 2   x x x .       . . x .      . . x .
    q = 3   x x x x       . . . x      . . . x

Source: "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test",
arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Queries at a time: bounds the score matrix of a long document.
_QUERIES = 1024


def step_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]
) -> Tensor:
    """Attend to the keys of step 0 causally, and to one's own of every later step.

    Args:
        query: of this step: [tokens, 1, heads of this rank, head_dim].
        keys: of step 0 to this one: [tokens, 1, key/value heads of this rank, head_dim] each.
        values: like `keys`.
        lengths: tokens of each document of the row.

    Returns:
        [tokens, 1, heads of this rank * head_dim].
    """
    groups = query.shape[2] // keys[0].shape[2]

    def rows(x: Tensor, repeat: int = groups) -> tuple[Tensor, ...]:
        # [tokens, 1, heads, dim] -> [heads, tokens of a document, dim] of each document
        return x[:, 0].repeat_interleave(repeat, dim=1).transpose(0, 1).split(list(lengths), dim=1)

    documents = zip(
        rows(query, 1),
        rows(keys[0]),
        rows(values[0]),
        zip(*(rows(key) for key in keys[1:]), strict=True),
        zip(*(rows(value) for value in values[1:]), strict=True),
        strict=True,
    )
    parts = [_document(*document) for document in documents]
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1).unsqueeze(1)


def _document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
) -> Tensor:
    """[heads, tokens, dim] of one document."""
    tokens = query.shape[1]
    if tokens <= _QUERIES:
        return _some_queries(query, key, value, 0, *own_keys, *own_values)
    parts = []
    for begin in range(0, tokens, _QUERIES):
        end = min(begin + _QUERIES, tokens)
        own = (x[:, begin:end] for x in (*own_keys, *own_values))
        arguments = (query[:, begin:end], key[:, :end], value[:, :end], begin, *own)
        # The scores of one stretch at a time, in the backward pass too.
        parts.append(checkpoint(_some_queries, *arguments, use_reentrant=False))
    return torch.cat(parts, dim=1)


def _some_queries(query: Tensor, key: Tensor, value: Tensor, begin: int, *own: Tensor) -> Tensor:
    """Queries from position `begin` on; `own` are their own keys of the later steps, then values."""
    steps = len(own) // 2
    query = query * query.shape[-1] ** -0.5
    scores = query @ key.transpose(1, 2)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(begin)
    scores = scores.masked_fill(~seen, float("-inf"))
    mine = [(query * k).sum(dim=-1, keepdim=True) for k in own[:steps]]
    weights = torch.cat([scores, *mine], dim=-1).float().softmax(dim=-1).to(value.dtype)
    base, *drafted = weights.split([key.shape[1], *[1] * steps], dim=-1)
    out = base @ value
    for weight, v in zip(drafted, own[steps:], strict=True):
        out = out + weight * v
    return out


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn halves against each other, as Llama does: [..., heads, head_dim] by [..., 1, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * angles.cos() + turned * angles.sin()).to(x.dtype)
