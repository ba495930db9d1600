"""The packs of SFTDataset with the features of their documents.

documents        [ A... B.. ]                   the plan, epochs and shards are those of SFTDataset
input_ids        [ A A A A  B B B  . ]          . is padding
hidden_states    [ a a a a  b b b  0 ]          a row for each token: the states at it
topk_ids         [ 0 a a 0  b b 0  0 ]          a row where the next token of the document is trained
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.errors import DataError
from data.features.manifest import DTYPES, MANIFEST
from data.features.reader import FeatureReader, Features
from data.features.sample_files import SampleFiles
from data.packs.dataset import SFTDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_features(folder: str | Path) -> Features:
    """Open the features of a split, whoever wrote them.

    Args:
        folder: ``<features>/<split>``: of ``FeatureWriter``, or with a ``.pt`` file a sample.

    Raises:
        DataError: no features, not all of them, or not as they were written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() and next(folder.glob("*.pt"), None):
        return SampleFiles(folder)
    return FeatureReader(folder)


class OfflineDataset(SFTDataset):
    """Packs of one shard with features, by local index.

    Args:
        data_dir: ``<features>/<split>``, or what ``open_features`` gave for it.
        num_samples: Packs that this run uses over all shards, as ``num_packed_samples`` of SFTDataset.
        tokenizer: Its pad token fills the tail of packs; or that token's id.
        seq_length: Tokens in a pack; None for those of the longest document.
        num_shards: Data-parallel size.
        shard_index: This process' data-parallel rank.
        names: The fields that packs carry; None for all.
        options: ``seed``, ``packing``, ``shuffle``, ``epochs`` and ``global_batch_size`` of SFTDataset.

    Raises:
        DataError: as ``open_features`` and SFTDataset; a field that the folder does not hold.
    """

    def __init__(
        self,
        data_dir: str | Path | Features,
        num_samples: int | None = None,
        tokenizer: PreTrainedTokenizerBase | int = 0,
        seq_length: int | None = None,
        num_shards: int = 1,
        shard_index: int = 0,
        *,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.features = open_features(data_dir) if isinstance(data_dir, str | Path) else data_dir
        documents, fields = self.features.documents, self.features.fields
        self.names = list(fields if names is None else names)
        if lacking := [name for name in self.names if name not in fields]:
            raise DataError(
                f"{self.features.folder}: holds no {', '.join(lacking)}; it has {', '.join(fields)}. "
                "Extract features again with all that this training needs."
            )
        if seq_length is None:
            seq_length = int(documents.lengths.max())
        super().__init__(
            num_samples, documents, tokenizer, seq_length, num_shards, shard_index, **options
        )

    def global_pack(self, global_index: int) -> dict[str, torch.Tensor]:
        """The pack at ``global_index`` of the global plan.

        Returns:
            What SFTDataset gives, and each field ``[seq_length, width]`` in the dtype it is kept in. A
            row that is kept for each token stands at its token. One that is kept for each trained token
            stands at the position that predicts it, where the label mask of the pack is 1: there
            ``field[label_mask]`` has these rows in order. So packs with any number of them can be
            stacked, joined and cut as tokens are. All other rows are 0.
        """
        pack = super().global_pack(global_index)
        fields = [self.features.fields[name] for name in self.names]
        for field in fields:
            pack[field.name] = torch.zeros(self.seq_length, field.width, dtype=DTYPES[field.dtype])
        at = 0
        for document in self.document_indices(global_index).tolist():
            rows = self.features.read(document, self.names)
            mask = self.documents[document][1]
            predicts = torch.from_numpy(at + np.flatnonzero(mask[1:]))
            for field in fields:
                if field.per == "token":
                    pack[field.name][at : at + len(mask)] = rows[field.name]
                else:
                    pack[field.name][predicts] = rows[field.name]
            at += len(mask)
        return pack
