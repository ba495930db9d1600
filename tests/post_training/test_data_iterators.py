import pytest
import torch

from data import SFTDataset
from data.prepare import prepare_rows
from post_training.data_iterators import MicroBatchIterator
from tests.helpers.models import make_tokenizer
from tests.helpers.rows import make_rows

SEQ = 192


@pytest.fixture(scope="module")
def documents():
    return prepare_rows(make_rows(60), tokenizer=make_tokenizer(), seq_length=SEQ)


def dataset(documents, packs=12, shards=1, shard=0):
    return SFTDataset(packs, documents, make_tokenizer(), SEQ, shards, shard)


def test_micro_batches_follow_the_plan(documents):
    data = dataset(documents)
    for size in (1, 2, 4):
        batches = list(MicroBatchIterator(data, size))
        assert len(batches) == 12 // size
        assert batches[0]["input_ids"].shape == (size, SEQ)
        packs = torch.cat([batch["input_ids"] for batch in batches])
        assert all(torch.equal(packs[i], data[i]["input_ids"]) for i in range(12))


def test_it_starts_where_a_stopped_run_ended(documents):
    data = dataset(documents)
    late = next(MicroBatchIterator(data, 2, start=6))
    assert torch.equal(late["input_ids"][0], data[6]["input_ids"])


def test_data_parallel_ranks_together_read_each_pack_once(documents):
    """Reference's fault: shards and sampler disagree, so that data is read twice."""
    whole = dataset(documents)
    parts = [list(MicroBatchIterator(dataset(documents, 12, 3, s), 2)) for s in range(3)]
    seen = [b["input_ids"][i].tolist() for part in parts for b in part for i in range(2)]
    assert sorted(seen) == sorted(whole[i]["input_ids"].tolist() for i in range(12))


def test_evaluation_begins_again_and_training_ends(documents):
    again = MicroBatchIterator(dataset(documents, 4), 2, repeat=True)
    first = [next(again)["input_ids"] for _ in range(4)]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], first[3])
    once = MicroBatchIterator(dataset(documents, 4), 2)
    assert len(list(once)) == 2
