"""The map-style dataset of packs that training reads.

    documents         [ A......  B...  C..  D.... ]   variable length
    pack              [ A......  C..  ·· ]  [ D....  B... ]   seq_length tokens each, · is padding
    document_lengths  [ 7 3 0 ..         ]  [ 5 4 0 ..    ]   of the documents, not of padding
    position_ids      [ 0123456  012  01 ]  [ 01234  0123 ]   restarts where a document begins
    global plan       epoch 0: g0 g1 g2 | epoch 1: g3 g4 g5 | ...   one endless list of packs
    shards (2)        shard 0: g0 g2 g4 ...   shard 1: g1 g3 g5 ...

A global batch is a run of consecutive global packs, so it is the same set at any data-parallel
size, and a position in training is one number: consumed packs. It stays valid when the parallel
layout changes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from data.documents.documents import Documents
from data.documents.mixture import DocumentSet
from data.errors import DataError
from data.packs.epoch_plans import EpochPlans
from data.packs.filling import IntArray
from data.packs.plan import PACKING_MODES, PLAN_VERSION, PackingMode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Padding is cut into pretend documents of this many tokens, so that its attention costs next to
# nothing.
PADDING_SEGMENT = 256


def with_padding(document_lengths: Sequence[int], seq_length: int) -> list[int]:
    """Lengths of the documents of a pack and of the pretend ones of its padding: ``seq_length`` in all."""
    whole, rest = divmod(seq_length - sum(document_lengths), PADDING_SEGMENT)
    return [*document_lengths, *[PADDING_SEGMENT] * whole, *[rest] * (rest > 0)]


class SFTDataset(Dataset[dict[str, torch.Tensor]]):
    """Packs of one shard, by local index.

    An epoch is planned when a pack of it is read. ``shard`` gives other packs of the same plan,
    which is then made only once.

    Args:
        num_packed_samples: Packs that this run uses over all shards, taken from the endless plan
            (epoch after epoch); None for exactly one epoch (or ``epochs`` of them).
        hf_dataset: Prepared ``Documents``; or the name of a dataset of the hub, the path of a local
            one, a ``datasets.Dataset`` or a sequence of rows, which are prepared here in memory with
            default options.
        tokenizer: HuggingFace tokenizer; its pad (else end-of-sequence) token fills the tail of
            packs. For prepared documents that token's id is enough.
        seq_length: Tokens in a pack.
        num_shards: Data-parallel size.
        shard_index: This process' data-parallel rank.
        seed: Seed of the order and of who shares a pack.
        packing: ``best-fit``, ``sequential`` or ``none``; see ``data.packs.plan.plan_epoch``.
        shuffle: Whether the seed permutes documents and packs; False gives the data's own order
            (validation).
        epochs: Stop after this many epochs: later global indices are filler packs, padding only
            with a zero mask, so that every rank gets the same number of batches. None goes on for
            ever.
        global_batch_size: Packs in a global batch; given, packs inside each are ordered for equal
            attention work.

    Raises:
        DataError: no documents, a document longer than ``seq_length``, an impossible shard.
    """

    def __init__(
        self,
        num_packed_samples: int | None,
        hf_dataset: Documents | DocumentSet | str | Path | Sequence[Mapping[str, Any]] | Any,
        tokenizer: PreTrainedTokenizerBase | int,
        seq_length: int,
        num_shards: int = 1,
        shard_index: int = 0,
        *,
        seed: int = 1234,
        packing: PackingMode = "best-fit",
        shuffle: bool = True,
        epochs: int | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        _check_shard(num_packed_samples, num_shards, shard_index)
        if packing not in PACKING_MODES:
            raise DataError(f"--packing {packing}: unknown; known are {', '.join(PACKING_MODES)}.")
        self.documents = _as_documents(hf_dataset, tokenizer, seq_length)
        if len(self.documents) == 0:
            raise DataError(
                "there are no documents to train on: every row was dropped or none was read. "
                f"Rows by fate: {json.dumps(self.documents.report.get('dropped', {}))}."
            )
        self.seq_length = seq_length
        self.epochs = 1 if num_packed_samples is None and epochs is None else epochs
        self.pad_id = _padding_id(tokenizer)
        self.plans = EpochPlans(
            self.documents.lengths, seq_length, seed, packing, shuffle, global_batch_size
        )
        if num_packed_samples is None:
            assert self.epochs is not None
            num_packed_samples = self.plans.begin(self.epochs)
        self.num_packed_samples = num_packed_samples
        self.num_shards = num_shards
        self.shard_index = shard_index

    def shard(
        self, num_shards: int = 1, shard_index: int = 0, *, num_packed_samples: int | None = None
    ) -> Self:
        """Other packs of the same plan, which is shared.

        Args:
            num_shards: Data-parallel size.
            shard_index: Data-parallel rank.
            num_packed_samples: Packs over all shards; None for as many as here.

        Raises:
            DataError: an impossible shard.
        """
        _check_shard(num_packed_samples, num_shards, shard_index)
        part = copy.copy(self)
        part.num_shards, part.shard_index = num_shards, shard_index
        if num_packed_samples is not None:
            part.num_packed_samples = num_packed_samples
        return part

    def __len__(self) -> int:
        """Packs of this shard."""
        return max(0, -(-(self.num_packed_samples - self.shard_index) // self.num_shards))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Pack ``index`` of this shard.

        Returns:
            ``input_ids`` int64 ``[seq_length]``; ``loss_mask`` uint8 ``[seq_length]``, 1 where this
            token itself is trained (not shifted); ``position_ids`` int64 ``[seq_length]``, 0 where
            a document or a stretch of padding begins; ``document_lengths`` int64 ``[seq_length]``,
            tokens of each document in its order, 0 behind the last, so that packs can be stacked.
        """
        return self.global_pack(self.global_index(index))

    def global_index(self, index: int) -> int:
        """Where pack ``index`` of this shard is in the global plan."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of a shard with {len(self)} packs")
        return (index % len(self)) * self.num_shards + self.shard_index

    def global_pack(self, global_index: int) -> dict[str, torch.Tensor]:
        """The pack at ``global_index`` of the global plan, as ``__getitem__`` returns it."""
        ids = np.full(self.seq_length, self.pad_id, np.int64)
        mask = np.zeros(self.seq_length, np.uint8)
        documents = self.document_indices(global_index)
        lengths = self.plans.lengths[documents]
        at = 0
        for document in documents:
            document_ids, document_mask = self.documents[int(document)]
            end = at + len(document_ids)
            ids[at:end] = document_ids
            mask[at:end] = document_mask
            at = end
        pieces = np.array(with_padding(lengths.tolist(), self.seq_length))
        positions = np.arange(self.seq_length) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        lengths = np.pad(lengths, (0, self.seq_length - len(lengths)))
        return {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
            "document_lengths": torch.from_numpy(lengths),
        }

    def document_indices(self, global_index: int) -> IntArray:
        """Documents in a global pack, int64 ``[documents in the pack]``; none in a filler pack."""
        epoch, pack = self.locate(global_index)
        if self.epochs is not None and epoch >= self.epochs:
            return np.empty(0, np.int64)
        return self.plans.plan(epoch).pack(pack)

    def document_lengths(self, global_index: int) -> list[int]:
        """Tokens of each document in a global pack."""
        lengths: list[int] = self.plans.lengths[self.document_indices(global_index)].tolist()
        return lengths

    def locate(self, global_index: int) -> tuple[int, int]:
        """(epoch, pack index in it) of a global index; past the end: (epochs, how far past)."""
        if global_index < 0:
            raise IndexError(global_index)
        return self.plans.locate(global_index, self.epochs)

    def packs_per_epoch(self, epoch: int = 0) -> int:
        """Packs in one epoch, over all shards."""
        return self.plans.packs(epoch)

    @property
    def fill(self) -> float:
        """Share of real tokens in the packs of the first epoch."""
        return float(self.plans.lengths.sum()) / (self.packs_per_epoch(0) * self.seq_length)

    @property
    def plan_hash(self) -> str:
        """Hash of everything that the global plan depends on; a resumed run compares it.

        Where the plan ends (``epochs``) is no part of it: a run may be continued for more epochs.
        """
        return self.plan_hash_of(self.documents.contents)

    def plan_hash_of(self, documents: str) -> str:
        """The same for documents of another name: that of their cache, in versions before."""
        parts = [
            PLAN_VERSION,
            documents,
            self.seq_length,
            self.plans.seed,
            self.plans.packing,
            self.plans.shuffle,
            self.plans.balance_every,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _check_shard(num_packed_samples: int | None, num_shards: int, shard_index: int) -> None:
    if num_shards < 1 or not 0 <= shard_index < num_shards:
        raise DataError(
            f"shard_index {shard_index} of num_shards {num_shards}: "
            "the index must be 0 to num_shards - 1."
        )
    if num_packed_samples is not None and num_packed_samples < 0:
        raise DataError(
            f"num_packed_samples is {num_packed_samples}; "
            "it must be 0 or more, or None for one epoch."
        )


def _as_documents(
    rows: Any, tokenizer: PreTrainedTokenizerBase | int, seq_length: int
) -> Documents | DocumentSet:
    if isinstance(rows, Documents | DocumentSet):
        return rows
    if isinstance(tokenizer, int):
        raise DataError(
            "rows are prepared with a tokenizer; a token's id is enough for documents only."
        )
    # Here, because preparing needs far more than reading packs does.
    from data.prepare.prepare import prepare_documents, prepare_rows

    if isinstance(rows, str | Path):
        return prepare_documents(
            hf_dataset=str(rows), tokenizer=tokenizer, seq_length=seq_length, cache_dir=None
        )
    return prepare_rows(rows, tokenizer=tokenizer, seq_length=seq_length)


def _padding_id(tokenizer: PreTrainedTokenizerBase | int) -> int:
    if isinstance(tokenizer, int):
        return tokenizer
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError(
        "the tokenizer has neither a pad nor an end-of-sequence token; set one for padding."
    )
