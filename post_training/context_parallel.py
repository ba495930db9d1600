"""Which tokens of a row each context parallel rank holds, and which keys its queries may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def local_token_indices(packs: int, seq_length: int, size: int, rank: int) -> Tensor:
    """Tokens of one rank, in Megatron's load-balanced order.

    Every pack is cut into `2 * size` chunks, of which a rank holds one of the cheap first half and its
    mirror of the costly second half, so that causal attention costs all ranks about the same:

        size 2      chunk  0 1 2 3
                    rank   0 1 1 0

    Chunks are of a pack, not of a document: documents may have any length, nothing is padded, and packs
    are the same whatever the context parallel size.

    Args:
        packs: packs in a row.
        seq_length: tokens in a pack; a multiple of `2 * size`.
        size: context parallel size.
        rank: rank in the context parallel group.

    Returns:
        int64 [packs * seq_length / size], ascending: positions in the row.
    """
    chunks = torch.arange(packs * seq_length).view(packs, 2 * size, seq_length // (2 * size))
    return chunks[:, [rank, 2 * size - 1 - rank]].flatten()


@dataclass(frozen=True)
class ContextParallelCut:
    """The part of a row that one context parallel rank works on."""

    local_indices: Tensor
    """Positions in the row of this rank's tokens: int64 [local tokens]."""
    query_lengths: list[int]
    """This rank's tokens, cut where a document or a chunk ends: the tokens of each piece."""
    key_lengths: list[int]
    """For each piece the keys it may see: from its document's first token to its own last one."""
    key_indices: Tensor
    """The keys of all pieces one after the other, as positions in what an all-gather of the ranks'
    tokens returns: int64 [sum of key_lengths]."""

    @classmethod
    def make(
        cls, bounds: list[int], *, packs: int, seq_length: int, size: int, rank: int
    ) -> ContextParallelCut:
        """Cut a row.

        Args:
            bounds: where each document begins, and the number of tokens in the row.
            packs: packs in the row.
            seq_length: tokens in a pack; a multiple of `2 * size`.
            size: context parallel size.
            rank: rank in the context parallel group.
        """
        held = [local_token_indices(packs, seq_length, size, each) for each in range(size)]
        local = held[rank]
        row_to_gathered = torch.empty(packs * seq_length, dtype=torch.int64)
        row_to_gathered[torch.cat(held)] = torch.arange(packs * seq_length)

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
