from collections import Counter

import pytest
import torch

import data
from data.documents.mixture import split_documents
from data.errors import DataError
from data.features.dataset import OfflineDataset, open_features
from data.features.manifest import DTYPES
from data.packs.dataset import SFTDataset
from data.prepare.prepare import prepare_rows
from tests.data.features.folders import FIELDS, make_documents, states, write

SEQ, PAD = 48, 7


@pytest.fixture(scope="module")
def documents():
    return make_documents()


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    return write(tmp_path_factory.mktemp("features") / "train", documents).folder


def label_mask(pack):
    """Where the next token of the same document is trained."""
    mask, at = torch.zeros(SEQ, dtype=torch.bool), 0
    for length in pack["document_lengths"][pack["document_lengths"] > 0].tolist():
        mask[at : at + length - 1] = pack["loss_mask"][at + 1 : at + length].bool()
        at += length
    return mask


@pytest.mark.parametrize("packing", ["best-fit", "sequential", "none"])
def test_packs_are_those_of_the_documents_with_the_features_of_each(documents, folder, packing):
    options = {"packing": packing, "seed": 5, "global_batch_size": 4}
    offline = OfflineDataset(folder, 60, PAD, SEQ, **options)
    online = SFTDataset(60, documents, PAD, SEQ, **options)
    assert offline.plan_hash == online.plan_hash and len(offline) == len(online) == 60
    for index in range(60):
        pack, expected = offline[index], online[index]
        assert all(torch.equal(pack.pop(name), expected[name]) for name in expected)
        members = offline.document_indices(index).tolist()
        assert pack.keys() == {field.name for field in FIELDS}
        for field in FIELDS:
            found = pack[field.name]
            assert found.shape == (SEQ, field.width) and found.dtype == DTYPES[field.dtype]
            rows = torch.cat([states(documents, document, field) for document in members])
            mask = label_mask(expected) if field.per == "trained" else torch.arange(SEQ) < len(rows)
            assert torch.equal(found[mask], rows)
            assert not found[~mask].any()


def test_no_row_of_a_document_depends_on_another_document(documents, folder, tmp_path):
    """The features of one document are others: in every pack only its own rows change."""
    from tests.data.features import folders

    changed = 11
    original = folders.states

    def other(given, document, field):
        return original(given, document, field) + (1000 if document == changed else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "states", other)
        write(tmp_path / "train", documents)
    before, after = (OfflineDataset(each, None, PAD, SEQ) for each in (folder, tmp_path / "train"))
    seen = 0
    for index in range(len(before)):
        members = before.document_indices(index).tolist()
        owner = torch.full((SEQ,), -1)
        lengths = torch.tensor(before.document_lengths(index))
        owner[: int(lengths.sum())] = torch.repeat_interleave(torch.tensor(members), lengths)
        one, two = before[index], after[index]
        moved = (one["hidden_states"] != two["hidden_states"]).any(dim=1)
        assert torch.equal(moved, owner == changed)
        moved = (one["topk_logprobs"] != two["topk_logprobs"]).any(dim=1)
        assert torch.equal(moved, (owner == changed) & label_mask(one))
        seen += changed in members
    assert seen == 1


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_two_epochs_over_all_shards_are_each_document_twice(documents, folder, shards):
    whole = OfflineDataset(folder, None, PAD, SEQ, epochs=2)
    seen: Counter = Counter()
    for rank in range(shards):
        part = whole.shard(shards, rank)
        assert isinstance(part, OfflineDataset) and part.features is whole.features
        for index in range(len(part)):
            seen.update(part[index]["hidden_states"][:, 0].tolist())
    del seen[0.0]  # padding
    every = torch.cat([states(documents, d, FIELDS[0])[:, 0] for d in range(len(documents))])
    assert seen == Counter(dict.fromkeys(every.tolist(), 2))
    orders = [whole.plans.plan(epoch).documents.tolist() for epoch in range(2)]
    assert orders[0] != orders[1]


def test_documents_of_a_run_keep_their_plan(tokenizer, rows, tmp_path):
    prepared = prepare_rows(rows[:40], tokenizer=tokenizer, seq_length=128)
    for name, documents in (("whole", prepared), ("part", split_documents(prepared, [3, 1])[0])):
        write(tmp_path / name, documents, FIELDS[:1])
        offline = OfflineDataset(tmp_path / name, 9, tokenizer, 128, seed=4)
        online = SFTDataset(9, documents, tokenizer, 128, seed=4)
        assert offline.plan_hash == online.plan_hash
        assert torch.equal(offline[8]["input_ids"], online[8]["input_ids"])
        assert offline.documents.report["dropped"] == documents.report["dropped"]


def test_filler_packs_hold_nothing(folder):
    dataset = OfflineDataset(folder, 10**6, PAD, SEQ, epochs=1, names=["hidden_states"])
    pack = dataset[10**6 - 1]
    assert not pack["hidden_states"].any() and "topk_ids" not in pack


def test_the_folder_and_a_number_are_enough(documents, folder):
    dataset = data.OfflineDataset(str(folder), 25)
    assert len(dataset) == 25 and dataset.seq_length == documents.lengths.max()
    assert len(data.OfflineDataset(open_features(folder))) == dataset.packs_per_epoch()


def test_what_cannot_be_packed_is_refused(folder):
    with pytest.raises(DataError, match="--seq-length"):
        OfflineDataset(folder, None, PAD, 8)
    with pytest.raises(DataError, match="holds no logits, x; it has hidden_states, aux_hidden"):
        OfflineDataset(folder, None, PAD, SEQ, names=["hidden_states", "logits", "x"])
    with pytest.raises(DataError, match="a token's id is enough for documents only"):
        SFTDataset(None, [{"question": "a", "answer": "b"}], PAD, SEQ)
