import pytest
import torch

from data.documents.mixture import mix_documents
from data.errors import DataError
from data.features.dataset import OfflineDataset, open_features
from data.features.mixture import MixedFeatures
from data.packs.dataset import SFTDataset
from tests.data.features.folders import FIELDS, MADE_BY, make_documents, states, write


@pytest.fixture(scope="module")
def sources():
    return [make_documents(40, seed=1), make_documents(30, seed=2)]


@pytest.fixture(scope="module")
def folders(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    return [write(root / f"{n}" / "train", part).folder for n, part in enumerate(sources)]


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_each_document_keeps_its_own_features(sources, folders, weights):
    mixed = MixedFeatures([open_features(folder) for folder in folders], weights, ["a", "b"], 5)
    documents = mixed.documents
    if weights is None:
        assert len(documents) == 70
    else:
        online = mix_documents(sources, weights, ["a", "b"], 5)
        assert documents.contents == online.contents and len(documents) < 70
        plans = OfflineDataset(mixed, 9, 7, 48), SFTDataset(9, online, 7, 48)
        assert plans[0].plan_hash == plans[1].plan_hash
    for document in range(len(documents)):
        part, index = mixed.part_of(document), int(documents.index_of[document])
        found = mixed.read(document)
        for field in FIELDS:
            assert torch.equal(found[field.name], states(sources[part], index, field))


def test_folders_that_keep_other_features_are_refused_and_other_makers_are_said(
    sources, folders, tmp_path
):
    other = write(tmp_path / "other", sources[1], made_by={**MADE_BY, "base": "b2"}).folder
    mixed = MixedFeatures([open_features(folders[0]), open_features(other)], None, [], 5)
    assert mixed.made_by == {**MADE_BY, "base": ["b1", "b2"]}
    fewer = write(tmp_path / "fewer", sources[1], FIELDS[:2]).folder
    with pytest.raises(DataError, match="keeps other features than"):
        MixedFeatures([open_features(folders[0]), open_features(fewer)], None, [], 5)
