from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.packs import epoch_plans
from data.packs.dataset import PADDING_SEGMENT, SFTDataset
from data.packs.plan import plan_epoch
from data.prepare.prepare import prepare_rows

SEQ = 128


@pytest.fixture(scope="module")
def documents(tokenizer, rows):
    return prepare_rows(rows, tokenizer=tokenizer, seq_length=SEQ)


def make(documents, tokenizer, packs=None, shards=1, shard=0, **options):
    return SFTDataset(packs, documents, tokenizer, SEQ, shards, shard, **options)


def split_pack(pack):
    """Documents of a pack as (ids, mask)."""
    lengths = pack["document_lengths"][pack["document_lengths"] > 0].tolist()
    parts = (
        pack[name].split([*lengths, SEQ - sum(lengths)]) for name in ("input_ids", "loss_mask")
    )
    return [(ids.tolist(), mask.tolist()) for ids, mask in zip(*parts, strict=True)][: len(lengths)]


def test_pack_has_the_promised_tensors(documents, tokenizer):
    pack = make(documents, tokenizer)[0]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in pack.items()} == {
        "input_ids": (torch.int64, (SEQ,)),
        "loss_mask": (torch.uint8, (SEQ,)),
        "position_ids": (torch.int64, (SEQ,)),
        "document_lengths": (torch.int64, (SEQ,)),
    }


def test_positions_restart_where_a_document_begins(documents, tokenizer):
    dataset = make(documents, tokenizer)
    for index in range(len(dataset)):
        lengths = [len(documents[d][0]) for d in dataset.document_indices(index)]
        assert dataset.document_lengths(index) == lengths
        pack = dataset[index]
        assert pack["document_lengths"].tolist() == lengths + [0] * (SEQ - len(lengths))
        expected = [at for length in (*lengths, SEQ - sum(lengths)) for at in range(length)]
        assert pack["position_ids"].tolist() == expected


def test_shards_share_the_plan_of_their_dataset(documents, tokenizer, monkeypatch):
    planned = []

    def plan(*args, **options):
        planned.append(options["epoch"])
        return plan_epoch(*args, **options)

    monkeypatch.setattr(epoch_plans, "plan_epoch", plan)
    whole = make(documents, tokenizer, 0, seed=5, global_batch_size=4)
    assert not planned, "its size and places are known without"
    packs = whole.packs_per_epoch() + 3
    for rank in range(4):
        shard = whole.shard(4, rank, num_packed_samples=packs)
        alone = make(documents, tokenizer, packs, 4, rank, seed=5, global_batch_size=4)
        assert len(shard) == len(alone) and len(whole) == 0
        assert shard.plan_hash == alone.plan_hash
        before = len(planned)
        again = [shard[i]["input_ids"] for i in range(len(shard))]
        assert len(planned) - before == (2 if rank == 0 else 0)
        assert all(torch.equal(ids, alone[i]["input_ids"]) for i, ids in enumerate(again))


@pytest.mark.parametrize("packing", ["best-fit", "sequential", "none"])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_one_epoch_over_all_shards_is_each_document_once(documents, tokenizer, packing, shards):
    seen: Counter = Counter()
    for shard in range(shards):
        dataset = make(documents, tokenizer, shards=shards, shard=shard, packing=packing)
        for index in range(len(dataset)):
            for ids, mask in split_pack(dataset[index]):
                seen[tuple(ids), tuple(mask)] += 1
    expected = Counter(
        (tuple(ids.tolist()), tuple(mask.tolist()))
        for ids, mask in (documents[i] for i in range(len(documents)))
    )
    assert seen == expected


@pytest.mark.parametrize("packing", ["best-fit", "sequential"])
def test_a_global_batch_is_the_same_set_at_any_data_parallel_size(documents, tokenizer, packing):
    batch, total = 8, 64  # several epochs
    whole = make(documents, tokenizer, total, packing=packing, global_batch_size=batch)
    for shards in (2, 4, 8):
        parts = [
            make(documents, tokenizer, total, shards, s, packing=packing, global_batch_size=batch)
            for s in range(shards)
        ]
        local = batch // shards
        for step in range(total // batch):
            together = sorted(
                part[step * local + i]["input_ids"].tolist() for part in parts for i in range(local)
            )
            expected = sorted(whole[step * batch + i]["input_ids"].tolist() for i in range(batch))
            assert together == expected


@pytest.mark.parametrize("packing", ["best-fit", "sequential", "none"])
def test_balancing_moves_no_document_to_another_global_batch(documents, tokenizer, packing):
    plain = make(documents, tokenizer, 1000, packing=packing)
    epochs = sum(plain.packs_per_epoch(epoch) for epoch in range(4))
    batch = next(size for size in (7, 8, 9) if plain.packs_per_epoch() % size)
    level = make(documents, tokenizer, 1000, packing=packing, global_batch_size=batch)
    resumed = make(documents, tokenizer, 1000, packing=packing, global_batch_size=batch)
    orders = {
        name: [dataset.document_indices(g).tolist() for g in range(epochs)]
        for name, dataset in (("plain", plain), ("level", level))
    }
    for begin in range(0, epochs, batch):
        sets = {name: sorted(order[begin : begin + batch]) for name, order in orders.items()}
        assert sets["plain"] == sets["level"]
    assert orders["plain"] != orders["level"]
    # A later epoch asked for first, as after a resume, is planned alike.
    assert resumed.document_indices(epochs - 1).tolist() == orders["level"][-1]


@pytest.mark.parametrize("packing", ["best-fit", "sequential", "none"])
def test_locate_follows_the_concatenated_epochs(documents, tokenizer, packing):
    dataset = make(documents, tokenizer, 10**6, packing=packing)
    expected = [(e, p) for e in range(4) for p in range(dataset.packs_per_epoch(e))]
    assert [dataset.locate(g) for g in range(len(expected))] == expected
    assert len(dataset) == 10**6
    # Every epoch holds each document once, in another order.
    epochs = [
        [d for p in range(dataset.packs_per_epoch(e)) for d in dataset.plans.plan(e).pack(p)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(len(documents))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_resuming_at_any_position_continues_the_same_sequence(documents, tokenizer):
    straight = make(documents, tokenizer, 90)
    packs = [straight[i]["input_ids"] for i in range(90)]
    for position in (1, 37, 89):
        again = make(documents, tokenizer, 90)
        assert torch.equal(again[position]["input_ids"], packs[position])
        assert again.plan_hash == straight.plan_hash


def test_packs_past_the_last_epoch_are_filler_with_zero_mask(documents, tokenizer):
    per_epoch = make(documents, tokenizer).packs_per_epoch()
    dataset = make(documents, tokenizer, 2 * per_epoch + 5, epochs=2)
    assert len(dataset) == 2 * per_epoch + 5
    assert dataset[2 * per_epoch - 1]["loss_mask"].any()
    for index in range(2 * per_epoch, len(dataset)):
        assert dataset.locate(index) == (2, index - 2 * per_epoch)
        pack = dataset[index]
        assert not pack["loss_mask"].any()
        assert (pack["input_ids"] == tokenizer.pad_token_id).all()


def test_padding_is_masked_and_cut_into_short_segments(documents, tokenizer):
    dataset = SFTDataset(None, documents, tokenizer, 1000, packing="none")
    pack = dataset[0]
    length = len(documents[dataset.document_indices(0)[0]][0])
    tail = pack["position_ids"][length:]
    assert torch.equal(tail, torch.arange(1000 - length) % PADDING_SEGMENT)
    assert not pack["loss_mask"][length:].any()


def test_plan_hash_tells_plans_apart(documents, tokenizer):
    hashes = {
        make(documents, tokenizer).plan_hash,
        make(documents, tokenizer, seed=1).plan_hash,
        make(documents, tokenizer, packing="none").plan_hash,
        make(documents, tokenizer, shuffle=False).plan_hash,
        make(documents, tokenizer, global_batch_size=8).plan_hash,
    }
    assert len(hashes) == 5
    two_shards = make(documents, tokenizer, shards=2, shard=1)
    assert two_shards.plan_hash == make(documents, tokenizer).plan_hash


def test_fill_is_the_share_of_real_tokens(documents, tokenizer):
    dataset = make(documents, tokenizer, packing="none")
    assert dataset.fill == pytest.approx(documents.lengths.mean() / SEQ)


def test_rows_datasets_and_their_names_are_accepted_as_they_are(tokenizer, rows, tmp_path):
    import datasets

    from_rows = SFTDataset(None, rows, tokenizer, SEQ)
    from_dataset = SFTDataset(None, datasets.Dataset.from_list(rows), tokenizer, SEQ)
    assert from_rows.documents.contents == from_dataset.documents.contents
    assert from_rows.plan_hash == from_dataset.plan_hash
    # A local copy of a well-known dataset, whose training split has another name.
    folder = tmp_path / "ultrachat_200k"
    said = [("user", "question"), ("assistant", "answer")]
    chats = [
        {"messages": [{"role": role, "content": row[name]} for role, name in said]} for row in rows
    ]
    datasets.DatasetDict({"train_sft": datasets.Dataset.from_list(chats)}).save_to_disk(folder)
    for name in (folder, str(folder)):
        assert SFTDataset(4, name, tokenizer, SEQ, 1, 0).plan_hash == from_rows.plan_hash


@pytest.mark.parametrize(
    ("shards", "shard", "message"), [(0, 0, "num_shards 0"), (2, 2, "shard_index 2")]
)
def test_impossible_shard_is_refused(documents, tokenizer, shards, shard, message):
    with pytest.raises(DataError, match=message):
        make(documents, tokenizer, shards=shards, shard=shard)


def test_document_longer_than_the_pack_is_refused(documents, tokenizer):
    with pytest.raises(DataError, match="--seq-length"):
        SFTDataset(None, documents, tokenizer, 16)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    shards=st.integers(1, 6),
    micro_batch=st.integers(1, 3),
    steps_before=st.integers(0, 4),
    shards_after=st.integers(1, 6),
    packing=st.sampled_from(["best-fit", "sequential", "none"]),
)
def test_any_layout_and_resume_point_visits_each_document_once(
    documents, tokenizer, shards, micro_batch, steps_before, shards_after, packing
):
    """One epoch, stopped after some global batches and resumed at another data-parallel size."""
    batch = 60 * micro_batch  # divisible by every data-parallel size here, and by micro batches
    options = {"packing": packing, "epochs": 1, "global_batch_size": batch}
    per_epoch = make(documents, tokenizer, **options).packs_per_epoch()
    total = -(-per_epoch // batch) * batch
    consumed = min(steps_before * batch, total)
    seen: Counter = Counter()
    for size, first, last in ((shards, 0, consumed), (shards_after, consumed, total)):
        for shard in range(size):
            dataset = make(documents, tokenizer, total, size, shard, **options)
            for local in range(first // size, last // size):
                seen.update(dataset.document_indices(local * size + shard).tolist())
    assert seen == Counter(range(len(documents)))
