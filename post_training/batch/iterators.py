"""Micro batches in the order of the packing plan, for `--dataloader-type external`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from data import SFTDataset
from data.packs.pictures import PICTURE_FIELDS, PictureDataset
from post_training.batch.splits import SPLITS, Split
from post_training.metrics.step_counters import counters
from post_training.platform.training_hooks import hooks


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
            source_of: the number of a document's source, which is then the group of its tokens.
        """
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.next_index = start
        self.repeat = repeat
        self.source_of = source_of

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro batch: each field `[micro batch, seq_length]`.

        Those of the packs, features too, without `position_ids`, which follow from the lengths; and
        `groups` int64, the number of each token's source, 0 in padding and where sources are not told
        apart.
        """
        begin = time.perf_counter()
        if self.repeat and self.next_index >= self.repeat:
            self.next_index = 0
        if self.next_index >= len(self.dataset):
            raise StopIteration
        indices = range(self.next_index, self.next_index + self.micro_batch_size)
        packs = [self.dataset[index] for index in indices]
        self.next_index += self.micro_batch_size
        fields = ("input_ids", "loss_mask", "document_lengths")
        batch = {name: torch.stack([pack[name] for pack in packs]) for name in fields}
        batch |= {
            name: torch.stack([pack[name] for pack in packs])
            for name in packs[0].keys()
            - {*fields, "position_ids", "rope_positions", *PICTURE_FIELDS}
        }
        if isinstance(self.dataset, PictureDataset):
            batch |= self.dataset.join(packs)
        batch["groups"] = torch.zeros_like(batch["input_ids"])
        for index, pack, groups in zip(indices, packs, batch["groups"], strict=True):
            lengths = pack["document_lengths"][pack["document_lengths"] > 0]
            counters.add_documents(lengths.tolist())
            if self.source_of is not None:
                documents = self.dataset.document_indices(self.dataset.global_index(index))
                sources = torch.tensor(
                    [self.source_of(int(d)) for d in documents], dtype=torch.int64
                )
                marks = torch.repeat_interleave(sources, lengths)
                groups[: len(marks)] = marks
        counters.data_seconds += time.perf_counter() - begin
        return batch


def split_iterators(
    num_samples: Sequence[int],
    args: argparse.Namespace,
    splits: Mapping[str, Split],
    *,
    num_shards: int,
    shard_index: int,
) -> tuple[MicroBatchIterator | None, ...]:
    """Iterators over one data parallel rank's micro batches of train, valid and test.

    Args:
        num_samples: packs that Megatron wants of each.
        args: validated arguments.
        splits: by name.
        num_shards: data parallel size.
        shard_index: data parallel rank.
    """
    result: list[MicroBatchIterator | None] = []
    for name, samples in zip(SPLITS, num_samples, strict=True):
        if name not in splits:
            result.append(None)
            continue
        split = splits[name]
        if name == "train":
            packs = split.packs.shard(num_shards, shard_index, num_packed_samples=samples)
            start = (args.consumed_train_samples - args.data_begins_at) // num_shards
            micro, repeat = args.micro_batch_size, 0
        else:
            packs = split.packs.shard(num_shards, shard_index)
            start, micro = 0, args.eval_micro_batch_size
            # Every evaluation reads the same packs, from the first one.
            batches = hooks.evaluation_iterations.get(name, 0)
            repeat = batches * args.eval_global_batch_size // num_shards
        result.append(
            MicroBatchIterator(packs, micro, start=start, repeat=repeat, source_of=split.sources.of)
        )
    return tuple(result)
