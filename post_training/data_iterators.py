"""Micro batches in the order of the packing plan, for `--dataloader-type external`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from data import SFTDataset
from post_training.datasets import SPLITS, SplitDocuments, packs_of, sources_of
from post_training.platform.training_hooks import hooks
from post_training.step_counters import counters


class MicroBatchIterator(Iterator[dict[str, torch.Tensor]]):
    """Yields the micro batches of one data parallel rank.

    The dataset is already this rank's shard of the global plan, so a position in it is all the state
    there is: consumed samples divided by the data parallel size.

        global plan     g0 g1 g2 g3 | g4 g5 g6 g7 |  global batch of 4 packs
        shard 0 of 2    g0    g2    | g4    g6    |  micro batches of 2: (g0 g2) (g4 g6)
    """

    def __init__(
        self,
        dataset: SFTDataset,
        micro_batch_size: int,
        *,
        start: int = 0,
        repeat: int = 0,
        source_of: Callable[[int], int] | None = None,
    ) -> None:
        """Start at pack `start` of the shard.

        Args:
            dataset: this rank's shard.
            micro_batch_size: packs in a micro batch.
            start: local index of the first pack.
            repeat: begin again at 0 after this many packs (evaluation); 0: end after the last one.
            source_of: the number of a document's source; the loss mask then carries 1 + that number.
        """
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.next_index = start
        self.repeat = repeat
        self.source_of = source_of

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro batch: each field `[micro batch, seq_length]`."""
        begin = time.perf_counter()
        if self.repeat and self.next_index >= self.repeat:
            self.next_index = 0
        if self.next_index >= len(self.dataset):
            raise StopIteration
        indices = range(self.next_index, self.next_index + self.micro_batch_size)
        packs = [self.dataset[index] for index in indices]
        self.next_index += self.micro_batch_size
        for index, pack in zip(indices, packs, strict=True):
            shard = self.dataset.shard_index
            documents = self.dataset.document_indices(index * self.dataset.num_shards + shard)
            lengths = [len(self.dataset.documents[int(d)][0]) for d in documents]
            counters.add_documents(lengths)
            if self.source_of is not None and len(documents):
                groups = torch.tensor([1 + self.source_of(int(d)) for d in documents])
                marks = torch.repeat_interleave(groups, torch.tensor(lengths)).to(torch.uint8)
                pack["loss_mask"][: len(marks)] *= marks
        batch = {name: torch.stack([pack[name] for pack in packs]) for name in packs[0]}
        counters.data_seconds += time.perf_counter() - begin
        return batch


def split_iterators(
    num_samples: Sequence[int],
    args: argparse.Namespace,
    tokenizer: Any,
    documents: dict[str, SplitDocuments],
    *,
    num_shards: int,
    shard_index: int,
) -> tuple[MicroBatchIterator | None, ...]:
    """Iterators over one data parallel rank's micro batches of train, valid and test.

    Args:
        num_samples: packs that Megatron wants of each.
        args: validated arguments.
        tokenizer: the HuggingFace tokenizer.
        documents: prepared documents by split.
        num_shards: data parallel size.
        shard_index: data parallel rank.
    """
    result: list[MicroBatchIterator | None] = []
    for split, samples in zip(SPLITS, num_samples, strict=True):
        if split not in documents or (split == "train" and args.skip_train):
            result.append(None)
            continue
        options: dict[str, Any] = {"num_shards": num_shards, "shard_index": shard_index}
        if split == "train":
            options |= {
                "num_packed_samples": samples,
                "epochs": args.num_epochs,
                "global_batch_size": args.global_batch_size,
            }
            start = (args.consumed_train_samples - args.data_begins_at) // num_shards
            micro, repeat = args.micro_batch_size, 0
        else:
            start, micro = 0, args.eval_micro_batch_size
            # Every evaluation reads the same packs, from the first one.
            batches = hooks.evaluation_iterations.get(split, 0)
            repeat = batches * args.eval_global_batch_size // num_shards
        dataset = packs_of(documents[split], tokenizer, args, split, **options)
        source_of = sources_of(args, split, documents[split]).of
        result.append(
            MicroBatchIterator(dataset, micro, start=start, repeat=repeat, source_of=source_of)
        )
    return tuple(result)
