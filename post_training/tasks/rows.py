"""Rows of a task in the order of the run's own plan: a row is a document of one token, the row's number.

    task's dataset        r0 r1 r2 r3 r4 r5 r6
    plan (SFTDataset)     seeded epochs, shards, resume by a number of rows: as packs of conversations
    micro batch           collate_fn([r5, r2]); rows that fill up the last batch are left out, and a micro
                          batch of nothing else is one row that weighs 0, so that ranks stay together

The task's own sampler, batch size and `drop_last` have no say: no row is lost, and none counts twice.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from data import Documents, SFTDataset
from data.prepare.splits import cache_dir
from data.sources.digest import file_digests
from data.sources.files import resolve_files
from post_training.batch.splits import SPLITS, Sources, Split
from post_training.errors import RankStopped, SetupError
from post_training.platform.training_hooks import hooks
from post_training.tasks.task import source_file


@dataclass(frozen=True)
class TaskRows:
    """The rows of one split, and how the task makes a batch of them."""

    dataset: Any
    collate: Any
    workers: int


@dataclass(frozen=True)
class RowBatch:
    """One micro batch."""

    values: Any
    """What collate_fn made."""
    rows: int
    """How many rows of the data it holds; 0: one row that stands for none."""


def task_splits(
    args: argparse.Namespace, task: Any
) -> tuple[dict[str, Split], dict[str, TaskRows]]:
    """Every split of a task: its plan, and its rows.

    Raises:
        SetupError: what `build_dataloader` returned cannot be used, or there is nothing to train on.
    """
    splits: dict[str, Split] = {}
    rows: dict[str, TaskRows] = {}
    for split in SPLITS:
        name = "finetune_data_files" if split == "train" else f"{split}_data_files"
        paths = getattr(args, name)
        if not paths or (split == "train" and args.skip_train):
            continue
        rows[split] = _rows_of(args, task, paths, split)
        splits[split] = _planned(args, split, _documents(args, task, paths, rows[split]))
    if not splits or ("train" not in splits and not args.skip_train):
        flag = "--valid-data-files" if args.skip_train else "--finetune-data-files"
        raise SetupError(f"--task {args.task}: no data: give {flag}")
    return splits, rows


def describe_rows(splits: Mapping[str, Split], args: argparse.Namespace) -> str:
    """A line for each split."""
    return "\n".join(
        f"{name}: {len(split.documents):,} rows of {args.task}"
        + (
            f" = {len(split.documents) / args.global_batch_size:,.1f} steps"
            if name == "train"
            else ""
        )
        for name, split in splits.items()
    )


def _rows_of(args: argparse.Namespace, task: Any, paths: Sequence[str], split: str) -> TaskRows:
    where = f"--task {args.task}: build_dataloader"
    # Whatever is shuffled there has to lie in one order on every rank, and after a resume.
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    try:
        made = task.build_dataloader(list(paths), split != "train")
    except SetupError:
        raise
    except Exception as error:
        shown = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SetupError(f"{where} failed for the {split} data: {shown}") from error
    if isinstance(made, tuple) and made and isinstance(made[0], DataLoader):
        made = made[0]  # and facts about it
    if isinstance(made, DataLoader):
        found = TaskRows(made.dataset, made.collate_fn, made.num_workers)
    elif isinstance(made, tuple) and len(made) == 2 and callable(made[1]):
        found = TaskRows(made[0], made[1], 0)
    else:
        raise SetupError(
            f"{where} returned {type(made).__name__}, expected a DataLoader or (dataset, collate_fn)"
        )
    if isinstance(found.dataset, IterableDataset) or not hasattr(found.dataset, "__len__"):
        raise SetupError(
            f"{where}: the dataset {type(found.dataset).__name__} has no length: rows to be shuffled, "
            f"shared out and gone on with exactly need a dataset with __len__ and __getitem__"
        )
    if not len(found.dataset):
        raise SetupError(f"{where}: the {split} data has no rows")
    if isinstance(made, DataLoader):
        _check_loader(made, where)
    return found


def _check_loader(loader: DataLoader[Any], where: str) -> None:
    """Refuse what says which rows there are, or what they are, in a way that is not heeded here.

    Raises:
        SetupError: naming it.
    """
    if loader.batch_size is None and loader.batch_sampler is None:
        raise SetupError(
            f"{where}: a DataLoader with batch_size=None, whose rows are batches; give the rows, and a "
            f"collate_fn"
        )
    sampler = loader.sampler
    if not isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler) or (
        isinstance(sampler, RandomSampler)
        and (sampler.replacement or sampler.num_samples != len(sampler.data_source))
    ):
        raise SetupError(
            f"{where}: its sampler {type(sampler).__name__} chooses rows, here each is read once an epoch: "
            f"leave it out, or give the rows that are meant (torch.utils.data.Subset)"
        )


def _documents(
    args: argparse.Namespace, task: Any, paths: Sequence[str], rows: TaskRows
) -> Documents:
    """The rows as documents of one token."""
    documents = numbered(len(rows.dataset))
    # A position in them is valid while the files are the same; the task's code may be mended.
    contents = hashlib.sha256(documents.contents.encode())
    if isinstance(rows.dataset, SFTDataset):
        contents.update(rows.dataset.documents.contents.encode())
    elif all(Path(path).exists() for path in paths):
        for digest in file_digests(resolve_files(paths, "--task"), cache_dir(args)):
            contents.update(digest.encode())
    else:
        contents.update(repr(list(paths)).encode())
    source = source_file(task)
    code = hashlib.sha256(source.read_bytes()).hexdigest() if source else None
    report = {"sources": [", ".join(paths)], "made_of": {"task": code}}
    return replace(documents, contents=contents.hexdigest()[:32], report=report)


def numbered(count: int) -> Documents:
    """Documents of one token each, which is their number."""
    ids = np.arange(count, dtype=np.int32)
    return Documents(
        input_ids=ids,
        loss_mask=np.ones(count, np.uint8),
        offsets=np.arange(count + 1, dtype=np.int64),
        provenance=np.stack([np.zeros(count, np.int64), ids.astype(np.int64)], axis=1),
        hashes=ids.astype(np.uint64),
        fingerprint="task",
    )


def _planned(args: argparse.Namespace, split: str, documents: Documents) -> Split:
    if split == "train":
        packs = SFTDataset(
            None if args.num_epochs else 0,
            documents,
            0,
            1,
            packing="none",
            seed=args.seed,
            epochs=args.num_epochs,
            global_batch_size=args.global_batch_size,
        )
    else:
        packs = SFTDataset(None, documents, 0, 1, packing="none", shuffle=False)
        batch = args.eval_global_batch_size or args.global_batch_size
        packs = packs.shard(num_packed_samples=-(-len(packs) // batch) * batch)
    return Split(packs, Sources([], None))


class RowOrder:
    """A batch sampler: the rows of each micro batch of one shard, from `start` on."""

    def __init__(self, packs: SFTDataset, micro_batch_size: int, start: int, repeat: int) -> None:
        """Begin at row `start` of the shard, again at 0 after `repeat` rows (0: never)."""
        self.packs, self.size, self.start, self.repeat = packs, micro_batch_size, start, repeat

    def batches(self) -> Iterator[list[int]]:
        """Rows of the data in each micro batch; none where all of it fills up."""
        index = self.start
        while index < len(self.packs):
            rows: list[int] = []
            for local in range(index, index + self.size):
                rows += self.packs.document_indices(self.packs.global_index(local)).tolist()
            yield rows
            index += self.size
            if self.repeat and index >= self.repeat:
                index = 0

    def __iter__(self) -> Iterator[list[int]]:
        """What a DataLoader fetches."""
        return (rows or [0] for rows in self.batches())


class RowIterator(Iterator[RowBatch]):
    """Micro batches of a task, read by the workers that its DataLoader asked for."""

    def __init__(self, rows: TaskRows, order: RowOrder) -> None:
        """Nothing is read before the first batch."""
        self._counts = order.batches()
        # A seed for workers is drawn: not from the random state of the run, which dropout goes on with.
        first = order.start * order.packs.num_shards + order.packs.shard_index
        seeds = torch.Generator().manual_seed((torch.initial_seed() + first) % 2**63)
        self._loader: Any = DataLoader(
            rows.dataset,
            batch_sampler=order,
            collate_fn=rows.collate,
            num_workers=rows.workers,
            generator=seeds,
        )
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> RowBatch:
        """The next micro batch, on the host.

        Raises:
            RankStopped: a row cannot be read, or collate_fn fails.
        """
        if self._batches is None:
            self._batches = iter(self._loader)
        rows = next(self._counts)
        try:
            values = next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            shown = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            numbers = ", ".join(str(row) for row in (rows or [0])[:8])
            raise RankStopped(
                f"the task cannot make a batch of its rows {numbers}: {shown}"
            ) from error
        return RowBatch(values, len(rows))


def row_iterators(
    num_samples: Sequence[int],
    args: argparse.Namespace,
    splits: Mapping[str, Split],
    rows: Mapping[str, TaskRows],
    *,
    num_shards: int,
    shard_index: int,
) -> tuple[RowIterator | None, ...]:
    """Iterators over one data parallel rank's micro batches of train, valid and test.

    Args:
        num_samples: rows that Megatron wants of each.
        args: validated arguments.
        splits: by name.
        rows: the same splits' rows.
        num_shards: data parallel size.
        shard_index: data parallel rank.
    """
    found: list[RowIterator | None] = []
    for name, samples in zip(SPLITS, num_samples, strict=True):
        if name not in splits:
            found.append(None)
            continue
        packs = splits[name].packs
        if name == "train":
            packs = packs.shard(num_shards, shard_index, num_packed_samples=samples)
            start = (args.consumed_train_samples - args.data_begins_at) // num_shards
            order = RowOrder(packs, args.micro_batch_size, start, 0)
        else:
            packs = packs.shard(num_shards, shard_index)
            batches = hooks.evaluation_iterations.get(name, 0)
            repeat = batches * args.eval_global_batch_size // num_shards
            order = RowOrder(packs, args.eval_micro_batch_size, 0, repeat)
        found.append(RowIterator(rows[name], order))
    return tuple(found)


def to_device(values: Any, device: torch.device) -> Any:
    """The same lists, tuples and mappings, their tensors on a device."""
    if isinstance(values, torch.Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, Mapping):
        moved = {key: to_device(value, device) for key, value in values.items()}
        if type(values) is dict or not isinstance(values, MutableMapping):
            return moved
        # Such as a defaultdict, or the BatchEncoding of a tokenizer.
        kept = copy.copy(values)
        kept.update(moved)
        return kept
    if isinstance(values, list | tuple) and not hasattr(values, "_fields"):
        return type(values)(to_device(value, device) for value in values)
    return values
