"""Features of several folders as those of one, each with its share of tokens where weights are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from data.documents.mixture import join_documents, mix_documents
from data.errors import DataError
from data.features.reader import Features


class MixedFeatures:
    """Documents of several folders and what is kept of each.

    Args:
        parts: What ``open_features`` gave for each folder.
        weights: Their shares of the tokens, as of ``mix_documents``; None for every document of all.
        names: Of the folders, for the report.
        seed: Decides which documents of a larger folder are taken.

    Raises:
        DataError: they do not keep the same fields.
    """

    def __init__(
        self,
        parts: Sequence[Features],
        weights: Sequence[float] | None,
        names: Sequence[str],
        seed: int,
    ) -> None:
        first, self.parts = parts[0], parts
        for part in parts[1:]:
            if part.fields != first.fields or (part.made_by is None) != (first.made_by is None):
                raise DataError(
                    f"{part.folder}: keeps other features than {first.folder}: "
                    f"{', '.join(map(str, part.fields.values()))}; there they are "
                    f"{', '.join(map(str, first.fields.values()))}. Extract them alike."
                )
        self.folder, self.fields = first.folder, first.fields
        # Where they differ all are said: a resumed run compares them.
        self.made_by = first.made_by and {
            key: value if all(value == other for other in others) else [value, *others]
            for key, value in first.made_by.items()
            for others in [[(part.made_by or {}).get(key) for part in parts[1:]]]
        }
        documents: list[Any] = [part.documents for part in parts]
        self.documents = (
            join_documents(documents)
            if weights is None
            else mix_documents(documents, weights, names, seed)
        )

    def part_of(self, document: int) -> int:
        """The number of the folder that a document is in."""
        return int(self.documents.part_of[document])

    def read(self, document: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The fields of a document, as its own folder reads them."""
        part = self.parts[self.part_of(document)]
        return part.read(int(self.documents.index_of[document]), names)


def parts_of(features: Features) -> Sequence[Features]:
    """What was opened, folder by folder."""
    return features.parts if isinstance(features, MixedFeatures) else [features]
