from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import SFTDataset
from data.documents.mixture import mix_documents, split_documents
from data.prepare.prepare import prepare_rows
from post_training.batch.iterators import MicroBatchIterator
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
    again = MicroBatchIterator(dataset(documents, 4), 2, repeat=4)
    first = [next(again)["input_ids"] for _ in range(4)]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], first[3])
    part = MicroBatchIterator(dataset(documents, 4), 2, repeat=2)
    assert all(torch.equal(next(part)["input_ids"], first[0]) for _ in range(3))
    once = MicroBatchIterator(dataset(documents, 4), 2)
    assert len(list(once)) == 2


# Every document once an epoch, through dataset and iterator, whatever the layout and however often
# a run stops and goes on in another one.

BATCH = 24  # packs, which the packs of these epochs do not divide into
LAYOUTS = [(dp, micro) for dp in (1, 2, 3, 4, 6, 8, 12) for micro in (1, 2, 3, 4)
           if BATCH % (dp * micro) == 0]  # fmt: skip


def numbered_rows(count, first=0):
    """Rows that differ from each other, of 1 to 12 times the same words."""
    return [
        {"question": f"{number}?", "answer": "It is four. " * (1 + number * 7919 % 12)}
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def sources():
    """One source; two mixed by weight, the larger one in part; a part of a split."""
    first, second = (
        prepare_rows(numbered_rows(count, begin), tokenizer=make_tokenizer(), seq_length=SEQ)
        for count, begin in ((150, 0), (90, 1000))
    )
    mixed = mix_documents([first, second], [1.0, 3.0], ["first", "second"], seed=7)
    assert 0 < len(mixed) < len(first) + len(second)
    return {"one": first, "mixed": mixed, "split": split_documents(first, [0.8, 0.2])[0]}


def documents_in(batch):
    """Ids of each document in each pack of a micro batch."""
    for ids, lengths in zip(batch["input_ids"], batch["document_lengths"], strict=True):
        ends = [0, *lengths[lengths > 0].cumsum(0).tolist()]
        yield [tuple(ids[begin:end].tolist()) for begin, end in pairwise(ends)]


@pytest.mark.slow
@settings(max_examples=60)
@given(
    source=st.sampled_from(["one", "mixed", "split"]),
    packing=st.sampled_from(["best-fit", "sequential", "none"]),
    epochs=st.integers(1, 3),
    stops=st.lists(st.integers(0, 40), max_size=3),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
)
def test_each_document_is_seen_once_an_epoch(sources, source, packing, epochs, stops, layouts):
    documents = sources[source]
    own = Counter(tuple(documents[i][0].tolist()) for i in range(len(documents)))
    assert set(own.values()) == {1}
    options = {"packing": packing, "epochs": epochs, "global_batch_size": BATCH, "seed": 3}
    plan = SFTDataset(None, documents, make_tokenizer(), SEQ, **options)
    steps = -(-plan.num_packed_samples // BATCH)
    seen: dict[int, list] = {}  # documents by place in the global plan
    bounds = [0, *sorted(min(stop, steps) for stop in stops), steps]
    for (begin, end), (dp, micro) in zip(pairwise(bounds), layouts, strict=False):
        for shard in range(dp):
            data = SFTDataset(steps * BATCH, documents, make_tokenizer(), SEQ, dp, shard, **options)
            assert data.plan_hash == plan.plan_hash
            batches = MicroBatchIterator(data, micro, start=begin * BATCH // dp)
            for index in range(begin * BATCH // dp, end * BATCH // dp, micro):
                for offset, pack in enumerate(documents_in(next(batches))):
                    place = (index + offset) * dp + shard
                    assert place not in seen
                    seen[place] = pack
            if end == steps:
                assert next(batches, None) is None  # all ranks end at the same step
    assert sorted(seen) == list(range(steps * BATCH))
    at = 0
    for epoch in range(epochs):
        packs = plan.packs_per_epoch(epoch)
        assert Counter(d for p in range(at, at + packs) for d in seen[p]) == own
        at += packs
    assert at == plan.num_packed_samples
    assert not any(seen[place] for place in range(at, steps * BATCH))  # filler packs
