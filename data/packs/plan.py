"""Which documents share a pack: plans over document lengths, never over tokens.

A pack is one training sequence of at most ``seq_length`` tokens made of whole documents. A plan for
one epoch is two integer arrays, so that it costs a few bytes a document however many tokens the
documents hold:

    documents     [num_documents]   document indices, pack after pack
    pack_offsets  [num_packs + 1]   pack p holds documents[pack_offsets[p] : pack_offsets[p + 1]]

Plans are pure functions of (lengths, seq_length, seed, epoch, mode) and of where the epoch begins in
its first global batch: every process computes the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.packs.filling import IntArray, fill_packs, next_fit

PackingMode = Literal["best-fit", "sequential", "none"]
PACKING_MODES: tuple[PackingMode, ...] = ("best-fit", "sequential", "none")

# Part of every plan's hash: raise it whenever the same inputs would give another plan.
PLAN_VERSION = 2


@dataclass(frozen=True)
class PackingPlan:
    """One epoch's packs, in training order.

    Attributes:
        documents: int64 ``[num_documents]``, document indices, pack after pack.
        pack_offsets: int64 ``[num_packs + 1]``, where each pack begins in ``documents``.
    """

    documents: IntArray
    pack_offsets: IntArray

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    def pack(self, index: int) -> IntArray:
        """The document indices of pack ``index``, in the order in which they stand in the pack."""
        return self.documents[self.pack_offsets[index] : self.pack_offsets[index + 1]]


def check_lengths(lengths: IntArray, seq_length: int) -> None:
    """Refuse documents that no pack of ``seq_length`` tokens can hold.

    Args:
        lengths: int64 ``[num_documents]``.
        seq_length: Tokens in a pack.

    Raises:
        DataError: a document is empty or longer than ``seq_length``.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > seq_length):
        worst = int(np.argmax(lengths)) if lengths.max() > seq_length else int(np.argmin(lengths))
        raise DataError(
            f"document {worst} has {lengths[worst]} tokens; "
            f"a pack holds 1 to {seq_length} (--seq-length). "
            "Prepare the documents with the same --seq-length and an --overlong policy."
        )


def plan_epoch(
    lengths: npt.NDArray[np.integer],
    seq_length: int,
    *,
    seed: int,
    epoch: int,
    mode: PackingMode = "best-fit",
    shuffle: bool = True,
    balance_every: int | None = None,
    begins_at: int = 0,
    filled: tuple[IntArray, int] | None = None,
) -> PackingPlan:
    """Plan the packs of one epoch: each document once, in exactly one pack.

    Args:
        lengths: Integers ``[num_documents]``, tokens in each document; 1 to ``seq_length``.
        seq_length: Tokens in a pack.
        seed: The run's data seed.
        epoch: Epoch number; each epoch gets another order and other neighbours.
        mode: ``best-fit`` fills packs as full as possible, ``sequential`` keeps the documents'
            (shuffled) order and opens a new pack when the next document does not fit, ``none`` puts
            each document alone.
        shuffle: Whether the seed permutes documents and packs.
        balance_every: Packs in a global batch. Inside each global batch packs are ordered by
            attention work, so that packs that different data-parallel ranks process at the same
            time cost the same.
        begins_at: Packs before this epoch in the endless plan. Global batches are counted from the
            plan's beginning, so an epoch rarely begins where one of them does.
        filled: What ``fill_packs`` gave for these lengths, to be used again for another epoch.

    Raises:
        DataError: a document is empty or longer than ``seq_length``.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    check_lengths(sizes, seq_length)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    if mode == "best-fit":
        # Which lengths share a pack is the same in every epoch; which documents have them is not.
        pack_of = np.empty(len(sizes), np.int64)
        by_length = order[np.argsort(-sizes[order], kind="stable")]
        pack_of[by_length], num_packs = filled or fill_packs(sizes, seq_length)
    elif mode == "sequential":
        pack_of = np.empty(len(sizes), np.int64)
        pack_of[order], num_packs = next_fit(sizes[order], seq_length)
    elif mode == "none":
        pack_of, num_packs = np.arange(len(sizes)), len(sizes)
    else:
        raise DataError(f"--packing {mode}: unknown; known are {', '.join(PACKING_MODES)}.")

    if shuffle:
        rank = rng.permutation(num_packs)
    elif mode == "best-fit":
        # Without shuffling a reader expects file order: packs come by their first document.
        first = np.full(num_packs, len(sizes), np.int64)
        np.minimum.at(first, pack_of, np.arange(len(sizes)))
        rank = np.empty(num_packs, np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(num_packs)
    else:
        rank = np.arange(num_packs)
    if balance_every is not None and balance_every > 1:
        rank = _balance(rank, pack_of, sizes, balance_every, begins_at % balance_every)

    position = rank[pack_of]
    documents = order[np.argsort(position[order], kind="stable")]
    counts = np.bincount(position, minlength=num_packs)
    return PackingPlan(documents, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _balance(
    rank: IntArray, pack_of: IntArray, sizes: IntArray, group: int, taken: int
) -> IntArray:
    """Reorder the packs of each global batch by falling attention work.

    Neighbours then cost nearly the same, and neighbours are what runs side by side: data-parallel
    ranks take positions g, g + 1, ..., and pipeline micro batches follow each other. No pack moves
    to another global batch, so the gradient of a global batch does not change.

    Args:
        rank: Position of each pack in the epoch, int64 ``[num_packs]``.
        pack_of: Pack of each document.
        sizes: Tokens in each document.
        group: Packs in a global batch.
        taken: Packs of the first global batch that belong to the epoch before. Behind them this
            epoch's go by rising work: the lightest packs of both epochs meet.
    """
    work = np.bincount(pack_of, weights=sizes.astype(np.float64) ** 2, minlength=len(rank))
    batch = (rank + taken) // group
    falling = np.where((batch == 0) & (taken > 0), work, -work)
    order = np.lexsort((rank, falling, batch))  # pack numbers, in their new order
    balanced = np.empty_like(rank)
    balanced[order] = np.arange(len(rank))
    return balanced
