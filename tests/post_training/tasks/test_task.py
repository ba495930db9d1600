import argparse
import collections
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler

from data import SFTDataset
from post_training.errors import SetupError
from post_training.tasks.rows import (
    RowIterator,
    RowOrder,
    TaskRows,
    _rows_of,
    numbered,
    task_splits,
    to_device,
)
from post_training.tasks.task import load_task

ROWS: Any = [1, 2]
SOURCE = """
class Whole:
    def __init__(self, cfg): self.own = cfg
    def build_dataloader(self, data_paths, eval_dataset=False): return list(data_paths), list
    def get_train_model_output(self, batch): return None
    def get_eval_model_output(self, batch): return 0
class Own(Whole):
    def build_model(self): return None
class Lacks:
    def build_dataloader(self, data_paths, eval_dataset=False): return None
    def get_train_model_output(self, batch): return None
class Breaks(Whole):
    def __init__(self, cfg): raise ValueError("no such key")
"""


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("{file}:Whole", None),
        ("{file}:Other", "has no class Other; it has Whole, Own, Lacks, Breaks"),
        ("{file}:Lacks", "Lacks has no get_eval_model_output"),
        ("{file}:Breaks", "Breaks cannot be made: ValueError: no such key"),
        ("{file}x.py:Whole", "there is no file"),
        ("Whole", "expected FILE.py:ClassName"),
        ("no.such.module:Whole", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_class_is_found_or_refused_by_name(tmp_path, named, says):
    file = tmp_path / "a_task.py"
    file.write_text(SOURCE)
    given = {"lora": None, "chat_template": None, "conversation_format": None}
    args = argparse.Namespace(task=named.format(file=file), **given)
    if says is not None:
        with pytest.raises(SetupError, match=says):
            load_task(args, None)
        return
    task = load_task(args, "tokenizer")
    assert task.own is args and task.tokenizer == "tokenizer" and task.device.type == "cpu"
    args.chat_template = "chatml"
    with pytest.raises(SetupError, match="--chat-template: .* reads its own rows"):
        load_task(args, None)
    args.task = "post_training.tasks.conversations:Conversations"
    assert load_task(args, None).cfg is args


@pytest.mark.parametrize(
    "key", ["lora", "freeze", "recompute_granularity", "random_weights", "save_hf"]
)
def test_a_model_of_its_own_passes_no_flag_over(tmp_path, key):
    (tmp_path / "own_task.py").write_text(SOURCE)
    given = ("lora", "freeze", "recompute_granularity", "random_weights", "save_hf")
    none = dict.fromkeys((*given, "chat_template", "conversation_format"))
    args = argparse.Namespace(**none, task=f"{tmp_path / 'own_task.py'}:Own")
    assert load_task(args, None).cfg is args
    setattr(args, key, True)
    with pytest.raises(SetupError, match=f"--{key.replace('_', '-')}.*makes its own model"):
        load_task(args, None)
    args.task = args.task.replace(":Own", ":Whole")
    assert load_task(args, None).cfg is args


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (DataLoader(Endless()), "no length"),
        ([1, 2], "returned list, expected a DataLoader"),
        (
            DataLoader(ROWS, sampler=SubsetRandomSampler([0])),
            "sampler SubsetRandomSampler chooses",
        ),
        (DataLoader(ROWS, sampler=RandomSampler(ROWS, num_samples=1)), "RandomSampler chooses"),
        (DataLoader(ROWS, batch_size=None), "batch_size=None"),
        (([], list), "has no rows"),
        (KeyError("column"), "failed for the train data: KeyError: 'column'"),
    ],
)
def test_data_that_cannot_be_gone_on_with_is_refused(tmp_path, made, says):
    class Task:
        def build_dataloader(self, data_paths, eval_dataset):
            if isinstance(made, Exception):
                raise made
            return made

    args = argparse.Namespace(task="t.py:Task", finetune_data_files=["x"], skip_train=False, seed=1)
    with pytest.raises(SetupError, match=says):
        task_splits(args, Task())


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_each_row_is_read_once_and_what_fills_up_weighs_nothing(shards, micro):
    documents = numbered(13)
    packs = SFTDataset(None, documents, 0, 1, packing="none", shuffle=False)
    packs = packs.shard(num_packed_samples=-(-13 // (shards * micro)) * shards * micro)
    seen, lengths = [], set()
    for shard in range(shards):
        order = RowOrder(packs.shard(shards, shard), micro, 0, 0)
        batches = list(RowIterator(TaskRows(range(13), torch.tensor, 0), order))
        lengths.add(len(batches))
        for batch in batches:
            seen += batch.values.tolist()[: batch.rows]
    assert sorted(seen) == list(range(13)) and len(lengths) == 1


def test_rows_that_a_task_shuffles_lie_in_one_order_on_every_rank():
    class Task:
        def build_dataloader(self, data_paths, eval_dataset):
            rows = list(range(100))
            random.shuffle(rows)
            return [rows, np.random.permutation(100).tolist(), torch.randperm(100).tolist()], list

    args = argparse.Namespace(task="t.py:Task", seed=1)
    first, second = (_rows_of(args, Task(), ["x"], "train").dataset for _ in range(2))
    assert first == second and first[0] != sorted(first[0])


def test_a_batch_keeps_its_kind_on_the_device():
    batch: Any = collections.defaultdict(list, {"x": torch.ones(2), "y": [torch.ones(1)]})
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is collections.defaultdict and moved["z"] == []
    assert moved["x"].is_meta and moved["y"][0].is_meta and not batch["x"].is_meta
    encoding: Any = transformers.BatchEncoding(dict(batch))
    assert to_device(encoding, torch.device("meta"))["x"].is_meta
