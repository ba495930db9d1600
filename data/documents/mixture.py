"""Documents put together from several sources, or a part of them: mixtures and splits.

A ``DocumentSet`` has the interface of ``Documents`` and copies no tokens: it is an index array over
one or more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from data.documents.documents import Documents, contents_of
from data.errors import DataError
from data.images.pictures import Picture

IntArray = npt.NDArray[np.int64]
_BUCKETS = 1 << 32


@dataclass(frozen=True)
class DocumentSet:
    """Chosen documents of several ``Documents``.

    Attributes:
        parts: Where the documents are.
        part_of: int64 ``[num_documents]``, the part of each document.
        index_of: int64 ``[num_documents]``, its index in that part.
        chosen_by: Of each part, the flags that chose from it.
        report: Counts of the parts together, and what was mixed or split.
    """

    parts: Sequence[Documents]
    part_of: IntArray
    index_of: IntArray
    chosen_by: Sequence[str]
    report: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Document ``index``: ids int32 ``[tokens]`` and mask uint8 ``[tokens]``; views."""
        return self.parts[int(self.part_of[index])][int(self.index_of[index])]

    def pictures_of(self, index: int) -> list[Picture]:
        """The pictures of document ``index``."""
        return self.parts[int(self.part_of[index])].pictures_of(int(self.index_of[index]))

    @property
    def has_pictures(self) -> bool:
        """Whether any document has pictures."""
        return any(part.has_pictures for part in self.parts)

    @cached_property
    def contents(self) -> str:
        """Hash of the chosen documents in their order, wherever they were chosen from."""
        return contents_of(self.lengths, self.hashes, self._masks())

    def _masks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The masks one behind the other, a run of neighbours at a time."""
        breaks = (np.diff(self.part_of) != 0) | (np.diff(self.index_of) != 1)
        bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self)]
        for begin, end in pairwise(bounds):
            if begin < end:
                part = self.parts[int(self.part_of[begin])]
                first, last = int(self.index_of[begin]), int(self.index_of[end - 1])
                yield part.loss_mask[int(part.offsets[first]) : int(part.offsets[last + 1])]

    @property
    def lengths(self) -> IntArray:
        """Tokens in each document, int64 ``[num_documents]``."""
        return self._gather([part.lengths for part in self.parts])

    @property
    def provenance(self) -> IntArray:
        """Source and row of each document in its part, int64 ``[num_documents, 2]``."""
        return self._gather([np.asarray(part.provenance) for part in self.parts])

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each document's tokens, uint64 ``[num_documents]``."""
        return self._gather([np.asarray(part.hashes) for part in self.parts])

    @property
    def max_token_id(self) -> int:
        """The largest token id that occurs in the parts; -1 when they are empty."""
        return max((part.max_token_id for part in self.parts), default=-1)

    def _gather[T: np.generic](self, values: list[npt.NDArray[T]]) -> npt.NDArray[T]:
        starts = np.cumsum([0, *(len(part) for part in values[:-1])])
        gathered: npt.NDArray[T] = np.concatenate(values)[starts[self.part_of] + self.index_of]
        return gathered


def join_documents(parts: Sequence[Documents]) -> DocumentSet:
    """Every document of several sources, one source behind the other."""
    counts = [len(part) for part in parts]
    return DocumentSet(
        parts,
        np.repeat(np.arange(len(parts)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        [""] * len(parts),
        sum_reports([part.report for part in parts]),
    )


def mix_documents(
    parts: Sequence[Documents], weights: Sequence[float], names: Sequence[str], seed: int
) -> DocumentSet:
    """Mix sources so that each gives its share of the tokens.

    No document is repeated: the mixture is as large as the source that is scarcest for its weight
    allows, and of the others a random part is taken.

    Args:
        parts: Documents of each source.
        weights: Its weight, above 0; only their ratios count.
        names: Its name, for the report and messages.
        seed: Decides which documents of a larger source are taken.

    Returns:
        The mixture; ``report["mixture"]`` has each source's wanted and achieved share of tokens.
    """
    shares = np.array(weights) / sum(weights)
    lengths = [part.lengths for part in parts]
    totals = np.array([size.sum() for size in lengths])
    budget = float((totals / shares).min())
    part_of, index_of, achieved = [], [], []
    for number, size in enumerate(lengths):
        order = np.random.default_rng([seed, number]).permutation(len(size))
        target = shares[number] * budget
        # Up to the document whose end comes nearest to the share.
        ends = np.cumsum(size[order])
        count = max(1, int(np.searchsorted(ends, target + size.mean() / 2, side="right")))
        chosen = np.sort(order[:count])
        part_of.append(np.full(len(chosen), number, np.int64))
        index_of.append(chosen.astype(np.int64))
        achieved.append(int(size[chosen].sum()))
    mixture = {
        name: {
            "weight": float(share),
            "achieved": tokens / sum(achieved),
            "tokens": tokens,
            "documents": len(index),
            "of": len(part),
        }
        for name, share, tokens, index, part in zip(
            names, shares, achieved, index_of, parts, strict=True
        )
    }
    return DocumentSet(
        parts,
        np.concatenate(part_of),
        np.concatenate(index_of),
        [f"{weight} {seed} " for weight in weights],
        {**sum_reports([part.report for part in parts]), "mixture": mixture},
    )


def split_documents(documents: Documents, ratios: Sequence[float]) -> list[DocumentSet]:
    """Cut documents into disjoint parts, such as train, validation and test.

    A document's part follows from its tokens, so equal documents are never in two parts, and
    adding data later does not move a document from one part to another.

    Args:
        documents: What to split.
        ratios: Share of each part; they are scaled to sum to 1.

    Raises:
        DataError: ratios that are no numbers, negative or all zero.
    """
    shares = np.array(ratios, np.float64)
    if not len(shares) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() == 0:
        raise DataError(
            f"--split-ratio {','.join(map(str, ratios))}: expected shares of 0 or more for "
            "train, validation and test, such as 0.98,0.01,0.01."
        )
    bounds = np.cumsum(shares / shares.sum()) * _BUCKETS
    hashes = np.asarray(documents.hashes) >> np.uint64(32)
    part = np.searchsorted(bounds[:-1], hashes, side="right")
    sets = []
    for number in range(len(shares)):
        chosen = np.flatnonzero(part == number).astype(np.int64)
        report = {**documents.report, "split": {"ratio": float(shares[number]), "of": len(hashes)}}
        report["documents_in_split"] = len(chosen)
        sets.append(
            DocumentSet(
                [documents],
                np.zeros(len(chosen), np.int64),
                chosen,
                [f"{list(shares)} {number}"],
                report,
            )
        )
    return sets


def shared_documents(
    held_out: Documents | DocumentSet, train: Documents | DocumentSet
) -> tuple[IntArray, IntArray]:
    """Documents of one split that another has too, with the same tokens.

    Args:
        held_out: The smaller of the two, such as validation data.
        train: The other.

    Returns:
        int64 indices in ``held_out``, and of each the index of one like it in ``train``.
    """
    theirs = np.asarray(train.hashes)
    known = np.sort(held_out.hashes)
    places = np.minimum(np.searchsorted(known, theirs), max(len(known) - 1, 0))
    hits = np.flatnonzero(known[places] == theirs) if len(known) else places[:0]
    found, first = np.unique(theirs[hits], return_index=True)
    shared = np.flatnonzero(np.isin(held_out.hashes, found))
    order = np.searchsorted(found, held_out.hashes[shared])
    return shared, hits[first[order]]


def sum_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of several sources together."""
    total: dict[str, Any] = {
        "dropped": {},
        "unread": {},
        "bad_rows": [],
        "warnings": [],
        "sources": [],
    }
    for report in reports:
        for name, value in report.items():
            if name in ("dropped", "unread"):
                for reason, count in value.items():
                    total[name][reason] = total[name].get(reason, 0) + count
            elif name in ("bad_rows", "warnings", "sources"):
                total[name] += [item for item in value if item not in total[name]]
            elif name == "max_token_id":
                total[name] = max(total.get(name, -1), value)
            elif isinstance(value, int) and name not in (
                "separator",
                "reasoning_parts_removed_from_template",
            ):
                total[name] = total.get(name, 0) + value
            else:
                total.setdefault(name, value)
    return total
