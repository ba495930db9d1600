"""Which documents share a pack: plans over document lengths, never over tokens.

A pack is one training sequence of at most ``seq_length`` tokens made of whole documents. A plan for
one epoch is two integer arrays, so that it costs a few bytes a document however many tokens the
documents hold:

    documents     [num_documents]   document indices, pack after pack
    pack_offsets  [num_packs + 1]   pack p holds documents[pack_offsets[p] : pack_offsets[p + 1]]

Plans are pure functions of (lengths, seq_length, seed, epoch, mode): every process computes the
same one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.errors import DataError

IntArray = npt.NDArray[np.int64]
PackingMode = Literal["best-fit", "sequential", "none"]
PACKING_MODES: tuple[PackingMode, ...] = ("best-fit", "sequential", "none")

# Part of every plan's hash: raise it whenever the same inputs would give another plan.
PLAN_VERSION = 1


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


def plan_epoch(
    lengths: npt.NDArray[np.integer],
    seq_length: int,
    *,
    seed: int,
    epoch: int,
    mode: PackingMode = "best-fit",
    shuffle: bool = True,
    balance_every: int | None = None,
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
        balance_every: Packs in a global batch. Inside each such group packs are ordered by
            attention work, so that packs that different data-parallel ranks process at the same
            time cost the same.

    Raises:
        DataError: a document is empty or longer than ``seq_length``.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > seq_length):
        worst = int(np.argmax(sizes)) if sizes.max() > seq_length else int(np.argmin(sizes))
        raise DataError(
            f"document {worst} has {sizes[worst]} tokens; "
            f"a pack holds 1 to {seq_length} (--seq-length). "
            "Prepare the documents with the same --seq-length and an --overlong policy."
        )
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    if mode == "best-fit":
        pack_of = np.empty(len(sizes), np.int64)
        pack_of[order], num_packs = best_fit_decreasing(sizes[order], seq_length)
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
        rank = _balance(rank, pack_of, sizes, balance_every)

    position = rank[pack_of]
    documents = order[np.argsort(position[order], kind="stable")]
    counts = np.bincount(position, minlength=num_packs)
    return PackingPlan(documents, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def best_fit_decreasing(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Assign documents to packs, longest first, each to the fullest pack that still has room.

    Documents of equal length are interchangeable, and a pack that was just the tightest fit stays
    the tightest until the same length no longer fits into it. So whole runs are placed at once:
    packs with equal free space form a bucket, and a run of n documents of length L goes into a
    bucket with r free tokens floor(r / L) at a time. The work is O(n log n) for sorting plus one
    step per (length, bucket) pair, and the result is what placing documents one by one would give.

    Args:
        lengths: int64 ``[num_documents]``, each from 1 to ``capacity``.
        capacity: Tokens in a pack.

    Returns:
        int64 ``[num_documents]``, the pack of each document, and the number of packs. The number
        depends on the lengths alone, not on their order.
    """
    pack_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    changes = np.flatnonzero(np.diff(ordered)) + 1
    run_starts: list[int] = [0, *changes.tolist()] if len(ordered) else []
    run_ends: list[int] = [*changes.tolist(), len(ordered)] if len(ordered) else []

    free_sizes: list[int] = []  # distinct free spaces that have a bucket, ascending
    buckets: dict[int, list[IntArray]] = {}  # free space -> pack numbers
    num_packs = 0

    def put(free: int, packs: IntArray) -> None:
        if free == 0 or len(packs) == 0:
            return
        if free not in buckets:
            buckets[free] = []
            insort(free_sizes, free)
        buckets[free].append(packs)

    for start, end in zip(run_starts, run_ends, strict=True):
        length = int(ordered[start])
        at = start
        while at < end:
            waiting = end - at
            slot = bisect_left(free_sizes, length)
            if slot < len(free_sizes):
                free = free_sizes[slot]
                packs = buckets[free].pop()
                if not buckets[free]:
                    del buckets[free], free_sizes[slot]
                each = free // length
                needed = -(-waiting // each)
                put(free, packs[needed:])
                packs = packs[:needed]
            else:
                free = capacity
                each = free // length
                needed = -(-waiting // each)
                packs = np.arange(num_packs, num_packs + needed)
                num_packs += needed
            placed = min(waiting, each * len(packs))
            pack_of[by_length[at : at + placed]] = np.repeat(packs, each)[:placed]
            in_last = placed - each * (len(packs) - 1)
            put(free - each * length, packs[:-1])
            put(free - in_last * length, packs[-1:])
            at += placed
    return pack_of, num_packs


def next_fit(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Assign documents in their given order, opening a new pack when the next does not fit.

    Returns:
        int64 ``[num_documents]``, the pack of each document, and the number of packs.
    """
    ends = np.cumsum(lengths)
    starts: list[int] = []
    at = 0
    while at < len(lengths):
        starts.append(at)
        used_before = int(ends[at - 1]) if at else 0
        at = int(np.searchsorted(ends, used_before + capacity, side="right"))
    opens = np.zeros(len(lengths), np.int64)
    opens[starts] = 1
    return np.cumsum(opens) - 1, len(starts)


def attention_work(plan: PackingPlan, lengths: npt.NDArray[np.integer]) -> IntArray:
    """Attention work of each pack, int64 ``[num_packs]``: its squared document lengths."""
    if len(plan) == 0:
        return np.empty(0, np.int64)
    squares = np.asarray(lengths, np.int64)[plan.documents] ** 2
    return np.add.reduceat(squares, plan.pack_offsets[:-1])


def _balance(rank: IntArray, pack_of: IntArray, sizes: IntArray, group: int) -> IntArray:
    """Reorder packs inside each group of ``group`` positions by falling attention work.

    Neighbours then cost nearly the same, and neighbours are what runs side by side: data-parallel
    ranks take positions g, g + 1, ..., and pipeline micro batches follow each other. Which packs
    form a group does not change, so the gradient of a global batch does not either.
    """
    work = np.bincount(pack_of, weights=sizes.astype(np.float64) ** 2, minlength=len(rank))
    order = np.lexsort((rank, -work, rank // group))  # pack numbers, in their new order
    balanced = np.empty_like(rank)
    balanced[order] = np.arange(len(rank))
    return balanced
