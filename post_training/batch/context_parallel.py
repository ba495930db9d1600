"""Which tokens of a row each context parallel rank holds, and which keys its queries may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of queries that flash attention kernels work on at once: shorter pieces waste them.
TILE = 128


def owners(bounds: list[int], size: int, tile: int = TILE) -> Tensor:
    """Deal the tokens of a row to the ranks, in Megatron's load-balanced order.

    A document is cut into `2 * size` chunks, of which a rank holds one of the cheap first half and its
    mirror of the costly second half, so that causal attention costs all ranks about the same:

        size 2      chunk  0 1 2 3
                    rank   0 1 1 0

    Chunks may differ by one token; the spare ones go to the ranks that hold fewest. So documents may
    have any length, nothing is padded, packs are the same whatever the context parallel size, and all
    ranks still hold equally many tokens. Neighbouring documents whose chunks would be shorter than
    `tile` are cut as one: their attention costs little.

    Args:
        bounds: where each document begins, and the number of tokens in the row.
        size: context parallel size; divides the number of tokens.
        tile: least tokens of a chunk of a document that is cut alone.

    Returns:
        int64 [tokens]: the rank that holds each token.
    """
    order = [*range(size), *reversed(range(size))]
    held = [0] * size
    chunk_lengths: list[int] = []
    for length in _lengths_cut_as_one(bounds, 2 * size * tile):
        each, spare = divmod(length, 2 * size)
        lengths = [each] * (2 * size)
        held = [tokens + 2 * each for tokens in held]
        for _ in range(spare):
            rank = held.index(min(held))
            # A rank's first chunk takes the first spare token, its mirror the second.
            lengths[rank if lengths[rank] == each else -1 - rank] += 1
            held[rank] += 1
        chunk_lengths += lengths
    ranks = torch.tensor(order).repeat(len(chunk_lengths) // len(order))
    return torch.repeat_interleave(ranks, torch.tensor(chunk_lengths))


def _lengths_cut_as_one(bounds: list[int], shortest: int) -> list[int]:
    """Lengths of documents, where neighbours shorter than `shortest` are taken together."""
    lengths: list[int] = []
    together = False
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        short = end - start < shortest
        if short and together:
            lengths[-1] += end - start
        else:
            lengths.append(end - start)
        together = short
    return lengths


@dataclass(frozen=True)
class ContextParallelCut:
    """The part of a row that one context parallel rank works on."""

    local_indices: Tensor
    """Positions in the row of this rank's tokens, ascending: int64 [local tokens]."""
    query_lengths: list[int]
    """This rank's tokens, cut where a document or a chunk ends: the tokens of each piece."""
    key_lengths: list[int]
    """For each piece the keys it may see: from its document's first token to its own last one."""
    key_indices: Tensor
    """The keys of all pieces one after the other, as positions in what an all-gather of the ranks'
    tokens returns: int64 [sum of key_lengths]."""

    @classmethod
    def make(
        cls, bounds: list[int], *, size: int, rank: int, tile: int = TILE
    ) -> ContextParallelCut:
        """Cut a row.

        Args:
            bounds: where each document begins, and the number of tokens in the row.
            size: context parallel size; divides the number of tokens.
            rank: rank in the context parallel group.
            tile: see `owners`.
        """
        owner = owners(bounds, size, tile)
        gathered_to_row = torch.argsort(owner, stable=True)
        row_to_gathered = torch.empty_like(gathered_to_row)
        row_to_gathered[gathered_to_row] = torch.arange(len(owner))
        local = torch.nonzero(owner == rank).flatten()

        edges = torch.tensor(bounds)
        document = torch.searchsorted(edges, local, right=True) - 1
        # A piece ends where the next token is another document's, or is not this rank's.
        ends = torch.ones(len(local), dtype=torch.bool)
        ends[:-1] = (document[1:] != document[:-1]) | (local[1:] != local[:-1] + 1)
        last = torch.nonzero(ends).flatten()
        query_lengths = torch.diff(last, prepend=torch.tensor([-1]))
        first_keys = edges[document[last]]
        key_lengths = local[last] + 1 - first_keys
        # Count up from each piece's first key.
        offsets = torch.cumsum(key_lengths, 0) - key_lengths
        keys = torch.arange(int(key_lengths.sum()))
        keys += torch.repeat_interleave(first_keys - offsets, key_lengths)
        return cls(local, query_lengths.tolist(), key_lengths.tolist(), row_to_gathered[keys])
