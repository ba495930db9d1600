"""Micro batches in the order of the packing plan, for `--dataloader-type external`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from data import SFTDataset
from post_training.step_counters import counters


class MicroBatchIterator(Iterator[dict[str, torch.Tensor]]):
    """Yields the micro batches of one data parallel rank.

    The dataset is already this rank's shard of the global plan, so a position in it is all the state
    there is: consumed samples divided by the data parallel size.

        global plan     g0 g1 g2 g3 | g4 g5 g6 g7 |  global batch of 4 packs
        shard 0 of 2    g0    g2    | g4    g6    |  micro batches of 2: (g0 g2) (g4 g6)
    """

    def __init__(
        self, dataset: SFTDataset, micro_batch_size: int, *, start: int = 0, repeat: bool = False
    ) -> None:
        """Start at pack `start` of the shard.

        Args:
            dataset: this rank's shard.
            micro_batch_size: packs in a micro batch.
            start: local index of the first pack.
            repeat: begin again at 0 after the last pack (evaluation).
        """
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.next_index = start
        self.repeat = repeat

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro batch: each field `[micro batch, seq_length]`."""
        begin = time.perf_counter()
        if self.next_index >= len(self.dataset):
            if not self.repeat or len(self.dataset) == 0:
                raise StopIteration
            self.next_index = 0
        indices = range(self.next_index, self.next_index + self.micro_batch_size)
        packs = [self.dataset[index] for index in indices]
        self.next_index += self.micro_batch_size
        for index in indices:
            shard = self.dataset.shard_index
            documents = self.dataset.document_indices(index * self.dataset.num_shards + shard)
            counters.add_documents([len(self.dataset.documents[int(d)][0]) for d in documents])
        batch = {name: torch.stack([pack[name] for pack in packs]) for name in packs[0]}
        counters.data_seconds += time.perf_counter() - begin
        return batch
