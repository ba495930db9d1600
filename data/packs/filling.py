"""Putting lengths into packs: best-fit decreasing, a search for exact sums, and next-fit.

Best-fit decreasing is fast and nearly perfect while there are short documents to fill the gaps.
Where the shortest document is a few percent of a pack, as with short chats, every pack keeps a gap
of half that on average. Then whole *patterns* are searched for: lengths that add up to exactly a
pack. A pattern is drawn by the frequency of the lengths, so that what remains keeps their
distribution and goes on having exact sums, and it is used many times at once, so that the search
costs per distinct length and not per document.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# With more distinct lengths than this the search would take seconds; long packs have small gaps.
_MAX_DISTINCT = 8192
_TRIES = 8
# A pattern takes at most this share of its rarest length, which keeps the distribution.
_SHARE = 4
# The search leaves this share of the documents, the hardest to match, to best-fit decreasing.
_LEFTOVERS = (0.0, 0.02)


def fill_packs(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Assign lengths to as few packs as can be found quickly.

    Args:
        lengths: int64 ``[num_documents]``, each from 1 to ``capacity``, in any order.
        capacity: Tokens in a pack.

    Returns:
        int64 ``[num_documents]``, the packs of the documents *sorted by falling length*, and the
        number of packs. Both depend on the multiset of lengths alone.
    """
    ordered = -np.sort(-lengths)
    best = best_fit_decreasing(ordered, capacity)
    fewest = -(-int(ordered.sum()) // capacity)
    distinct = int(np.count_nonzero(np.diff(ordered))) + 1
    if best[1] > fewest and distinct <= _MAX_DISTINCT:
        for leftovers in _LEFTOVERS:
            found = fill_by_patterns(ordered, capacity, leftovers)
            if found[1] < best[1]:
                best = found
            if best[1] == fewest:
                break
    return best


def fill_by_patterns(ordered: IntArray, capacity: int, leftovers: float) -> tuple[IntArray, int]:
    """Assign lengths to packs by repeated exact sums.

    Args:
        ordered: int64 ``[num_documents]``, falling.
        capacity: Tokens in a pack.
        leftovers: Share of the documents that best-fit decreasing places in the end.

    Returns:
        The pack of each document, and the number of packs.
    """
    rng = np.random.default_rng(0)  # the same lengths always give the same packs
    counts = np.bincount(ordered, minlength=capacity + 1)
    # Documents of one length are consecutive; the next free one of each length:
    following = len(ordered) - np.cumsum(counts)
    pack_of = np.empty(len(ordered), np.int64)
    typical = max(1, int(ordered.mean()))
    num_packs, remaining = 0, len(ordered)
    while remaining > leftovers * len(ordered):
        pattern = _pattern(counts, capacity, typical, rng)
        repeats = max(1, min(int(counts[x]) // n for x, n in pattern.items()) // _SHARE)
        packs = np.arange(num_packs, num_packs + repeats)
        for length, times in pattern.items():
            begin = int(following[length])
            pack_of[begin : begin + repeats * times] = np.repeat(packs, times)
            following[length] += repeats * times
            counts[length] -= repeats * times
            remaining -= repeats * times
        num_packs += repeats
    rest = np.flatnonzero(counts)
    places = [np.arange(following[x], following[x] + counts[x]) for x in rest[::-1]]
    if places:
        left = np.concatenate(places)
        packs, more = best_fit_decreasing(ordered[left], capacity)
        pack_of[left] = packs + num_packs
        num_packs += more
    return pack_of, num_packs


def _pattern(
    counts: IntArray, capacity: int, typical: int, rng: np.random.Generator
) -> dict[int, int]:
    """Lengths (and how often each) that fill a pack, exactly if a few tries find such."""
    available = np.flatnonzero(counts)
    cumulative = np.cumsum(counts[available])
    # The largest available length up to each number of tokens, 0 for none.
    at_most = np.zeros(capacity + 1, np.int64)
    at_most[available] = available
    np.maximum.accumulate(at_most, out=at_most)
    shortest = int(available[0])
    best: dict[int, int] = {}
    smallest_gap = capacity + 1
    for _ in range(_TRIES):
        drawn: list[int] = []
        free = capacity
        while free > 2.6 * typical and free >= shortest:
            up_to = int(np.searchsorted(available, free, side="right"))
            pick = rng.integers(cumulative[up_to - 1])
            length = int(available[np.searchsorted(cumulative, pick, side="right")])
            drawn.append(length)
            free -= length
        up_to = int(np.searchsorted(available, free, side="right"))
        if up_to:
            # The best pair of two for what is still free.
            first = available[:up_to]
            sums = first + at_most[free - first]
            place = int(np.argmax(sums))
            drawn += [int(first[place]), int(sums[place] - first[place])]
        pattern: dict[int, int] = {}
        for length in drawn:
            if length and pattern.get(length, 0) < counts[length]:
                pattern[length] = pattern.get(length, 0) + 1
        gap = capacity - sum(length * times for length, times in pattern.items())
        if gap < smallest_gap:
            best, smallest_gap = pattern, gap
        if gap == 0:
            break
    return best


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
