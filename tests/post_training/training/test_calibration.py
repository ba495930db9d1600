"""Which packs inputs are measured on."""

import pytest
from transformers import AutoTokenizer

from data import SFTDataset
from data.prepare.prepare import prepare_rows
from post_training.training.calibration import calibration_packs
from tests.helpers.rows import make_rows


@pytest.fixture(scope="module")
def tokenizer(hf_model):
    return AutoTokenizer.from_pretrained(hf_model("qwen3"))


@pytest.fixture(scope="module")
def documents(tokenizer):
    return prepare_rows(make_rows(60), tokenizer=tokenizer, seq_length=128)


def test_whole_global_batches_of_the_beginning(documents, tokenizer):
    packs = SFTDataset(0, documents, tokenizer, 128)
    number, found = calibration_packs(packs, 5, 2)
    assert number % 2 == 0 and found >= 5
    assert found == sum(len(packs.document_indices(index)) for index in range(number))
    assert sum(len(packs.document_indices(index)) for index in range(number - 2)) < 5


def test_all_where_there_are_fewer(documents, tokenizer):
    packs = SFTDataset(None, documents, tokenizer, 128, epochs=1)
    number, found = calibration_packs(packs, 10**6, 4)
    assert found == len(documents) and number - 4 < packs.num_packed_samples <= number
    # The plan of steps has no end; its last global batch has documents of the next epoch.
    endless = SFTDataset(0, documents, tokenizer, 128)
    number, found = calibration_packs(endless, 10**6, 4)
    assert found >= len(documents) and number - 4 < packs.num_packed_samples <= number
