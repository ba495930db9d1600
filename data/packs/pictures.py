"""The packs of SFTDataset with the pictures of their documents, decoded when a pack is read.

    input_ids         [ A A i i i i A A   B B B   C i C C   . . ]     i: image tokens, . is padding
    rope_positions    [ 0 1 2 2 3 3 4 5   0 1 2   0 1 2 3   0 1 ]     one of three; each document's own
    pixel_values      [ patches of A's picture, of C's ]              float32 [patches, width]
    image_grid_thw    [ 1 4 4 ]  [ 1 2 2 ]                            int64 [pictures, 3]

Threads decode the pictures of the pack that comes next while the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from data.documents.provenance import document_place
from data.errors import DataError
from data.images.processor import ImageProcessor
from data.packs.dataset import SFTDataset

# Fields of a pack whose first dimension is its own: a micro batch has them one behind the other.
PICTURE_FIELDS = ("pixel_values", "image_grid_thw")
_THREADS = 4


class PictureDataset(SFTDataset):
    """Packs of one shard with pictures, by local index.

    Args:
        processor: Decodes pictures.
        num_packed_samples, hf_dataset, options: As of SFTDataset.

    Raises:
        DataError: as SFTDataset.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        num_packed_samples: int | None,
        hf_dataset: Any,
        **options: Any,
    ) -> None:
        super().__init__(num_packed_samples, hf_dataset, **options)
        self.processor = processor
        self._coming: dict[int, list[Future[torch.Tensor]]] = {}

    def global_pack(self, global_index: int) -> dict[str, torch.Tensor]:
        """The pack at ``global_index`` of the global plan.

        Returns:
            What SFTDataset gives; ``rope_positions`` int64 ``[seq_length, 3]``, which begin anew in each
            document and stretch of padding; and the fields of ``PICTURE_FIELDS`` of its pictures, in the
            order of their tokens. They may be none.

        Raises:
            DataError: a picture cannot be decoded; file and row are named.
        """
        pack = super().global_pack(global_index)
        layout = self.processor.layout
        coming = self._coming.pop(global_index, None) or self._begin(global_index)
        following = global_index + self.num_shards
        self._coming = {n: f for n, f in self._coming.items() if n == following}
        if following < self.num_packed_samples and following not in self._coming:
            self._coming[following] = self._begin(following)
        positions = pack["position_ids"][:, None].repeat(1, 3)
        pixels, grids, at = [], [], 0
        for document in self.document_indices(global_index).tolist():
            pictures = self.documents.pictures_of(document)
            ids, _ = self.documents[document]
            if pictures:
                own = [picture.grid for picture in pictures]
                positions[at : at + len(ids)] = torch.from_numpy(layout.positions(ids, own))
                grids += own
                for _ in pictures:
                    pixels.append(self._result(coming.pop(0), document))
            at += len(ids)
        pack["rope_positions"] = positions
        pack["pixel_values"] = torch.cat([self.processor.filler[:0], *pixels])
        shapes = torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64)
        pack["image_grid_thw"] = shapes.reshape(-1, 3)
        return pack

    def join(self, packs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What packs of a micro batch have beside those of SFTDataset.

        Returns:
            ``rope_positions`` int64 ``[packs, seq_length, 3]``; the fields of ``PICTURE_FIELDS``; and
            ``filler`` int64 ``[0 or 2]``: where they have no picture, the tokens of a document of one,
            which is not trained, to be put behind them, and whose patches are in the fields. Every rank
            then computes the same layers.
        """
        joined = {name: torch.cat([pack[name] for pack in packs]) for name in PICTURE_FIELDS}
        filler = torch.empty(0, dtype=torch.int64)
        if not len(joined["image_grid_thw"]):
            merge = self.processor.layout.merge
            joined["pixel_values"] = self.processor.filler
            joined["image_grid_thw"] = torch.tensor([[1, merge, merge]])
            # Not alone: a padded row repeats its last token.
            filler = torch.tensor([self.processor.layout.image_id, self.pad_id])
        positions = torch.stack([pack["rope_positions"] for pack in packs])
        return {**joined, "rope_positions": positions, "filler": filler}

    def _begin(self, global_index: int) -> list[Future[torch.Tensor]]:
        """Decode the pictures of a pack in the background."""
        return [
            _threads().submit(self.processor.pixels, picture)
            for document in self.document_indices(global_index).tolist()
            for picture in self.documents.pictures_of(document)
        ]

    def _result(self, coming: Future[torch.Tensor], document: int) -> torch.Tensor:
        try:
            return coming.result()
        except DataError as error:
            raise DataError(f"{document_place(self.documents, document)}: {error}") from error


@cache
def _threads() -> ThreadPoolExecutor:
    """Shared by the splits of a run, and started with the first picture."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
