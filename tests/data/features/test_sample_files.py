from typing import Any

import pytest
import torch

from data.errors import DataError
from data.features.dataset import OfflineDataset, open_features
from data.features.manifest import hidden_fields
from data.features.reader import require_made_by
from data.features.sample_files import SampleFiles
from tests.data.features.folders import HIDDEN, make_documents, states, write

FIELDS = hidden_fields(HIDDEN, "bf16")


def sample(documents, index, **others):
    ids, mask = (torch.tensor(part) for part in documents[index])
    rows = {field.name: states(documents, index, field) for field in FIELDS}
    return {"input_ids": ids.long(), **rows, "loss_mask": mask, "conversation_id": "c", **others}


@pytest.fixture
def documents():
    return make_documents(12)


@pytest.fixture
def folder(documents, tmp_path):
    for index in range(len(documents)):
        torch.save(sample(documents, index), tmp_path / f"{index:08}.pt")
    return tmp_path


def test_a_folder_of_samples_gives_the_packs_of_a_folder_of_features(documents, folder):
    write(folder / "safetensors", documents, FIELDS)
    samples, features = (open_features(each) for each in (folder, folder / "safetensors"))
    assert isinstance(samples, SampleFiles)
    assert samples.documents.contents == features.documents.contents
    both = [
        OfflineDataset(each, 9, 7, 64, seed=3, global_batch_size=2) for each in (samples, features)
    ]
    assert both[0].plan_hash == both[1].plan_hash
    for index in range(9):
        one, other = (each[index] for each in both)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_forms_in_which_others_write_a_sample(documents, folder):
    """A batch dimension of 1, masks of any dtype, or none."""
    ids, mask = (torch.tensor(part) for part in documents[0])
    mask[:2] = 0
    mask[-1] = 0
    forms = [
        {"loss_mask": mask.bool()},
        {"loss_mask": mask.to(torch.bfloat16)[None], "input_ids": ids[None]},
        {"loss_mask": mask, "hidden_states": states(documents, 0, FIELDS[0])[None]},
    ]
    for form in forms:
        written = sample(documents, 0, **form)
        torch.save(written, folder / "00000000.pt")
        samples = SampleFiles(folder)
        assert samples.documents[0][0].tolist() == ids.tolist()
        assert samples.documents[0][1].tolist() == mask.tolist()
        assert torch.equal(samples.read(0)["hidden_states"], states(documents, 0, FIELDS[0]))
    written = sample(documents, 0)
    del written["loss_mask"]
    torch.save(written, folder / "00000000.pt")
    assert SampleFiles(folder).documents[0][1].all()


BAD: dict[str, Any] = {
    "no ids": ({"input_ids": None}, "input_ids is missing"),
    "ids of text": ({"input_ids": "hello"}, "input_ids is no tensor"),
    "ids of floats": ({"input_ids": torch.rand(5)}, "input_ids are no token ids"),
    "negative ids": ({"input_ids": torch.tensor([-100])}, "input_ids are no token ids"),
    "no tokens": ({"input_ids": torch.zeros(0).long()}, r"input_ids has the shape \[0\]"),
    "two samples": ({"input_ids": torch.ones(2, 3).long()}, r"input_ids has the shape \[2, 3\]"),
    "fewer rows": ({"hidden_states": torch.ones(1, HIDDEN)}, "hidden_states has 1 rows for"),
    "another size": ({"hidden_states": "wide"}, "has hidden_states 8 x bf16 per token, .* where"),
    "another dtype": ({"hidden_states": "fp32"}, "has hidden_states 4 x fp32 per token, .* where"),
    "integers": ({"hidden_states": "int"}, "hidden_states is torch.int32, not float32"),
    "no states": (
        {"hidden_states": None, "aux_hidden_states": None},
        "holds none of hidden_states",
    ),
    "one kind": ({"aux_hidden_states": None}, "has hidden_states 4 x bf16 per token, where"),
    "before the norm": ({"hidden_states_prenorm": True}, "those before the final norm"),
    "a tensor for a flag": ({"hidden_states_prenorm": torch.ones(2, 4)}, "neither true nor false"),
    "another mask": ({"loss_mask": torch.ones(1)}, "loss_mask is not 0 or 1 for each of"),
    "a wrong mask": ({"loss_mask": "twos"}, "loss_mask is not 0 or 1 for each of"),
    "labels": ({"loss_mask": "none", "labels": torch.ones(5)}, "has labels and no loss_mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_one_message_with_its_file(documents, folder, case):
    changes, message = BAD[case]
    written = sample(documents, 5)
    tokens = len(written["input_ids"])
    made = {
        "wide": torch.ones(tokens, 8, dtype=torch.bfloat16),
        "fp32": torch.ones(tokens, HIDDEN),
        "int": torch.ones(tokens, HIDDEN, dtype=torch.int32),
        "twos": torch.full((tokens,), 2),
    }
    for name, value in changes.items():
        written[name] = made.get(value, value) if isinstance(value, str) else value
    if changes.get("loss_mask") == "none":
        del written["loss_mask"]
    torch.save(written, folder / "00000005.pt")
    with pytest.raises(DataError, match=f"00000005.pt: .*{message}"):
        open_features(folder)


@pytest.mark.parametrize("case", ["cut", "text", "empty", "list", "old format", "code"])
def test_a_file_that_holds_no_sample_is_one_message(documents, folder, case):
    path = folder / "00000005.pt"
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "text":
        path.write_text("hello")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "list":
        torch.save([1, 2], path)
    elif case == "old format":
        torch.save(sample(documents, 5), path, _use_new_zipfile_serialization=False)
    else:  # a pickle that runs something
        torch.save({"input_ids": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(DataError, match="00000005.pt: ") as caught:
        open_features(folder)
    assert "\n" not in str(caught.value)


def test_files_of_which_no_token_is_trained_are_refused(documents, tmp_path):
    written = sample(documents, 5)
    written["loss_mask"] = torch.arange(len(written["input_ids"])) == 0  # which none predicts
    torch.save(written, tmp_path / "a.pt")
    with pytest.raises(DataError, match="no file has a token that is trained"):
        open_features(tmp_path)


def test_of_samples_only_the_sizes_can_be_compared(folder):
    samples = open_features(folder)
    require_made_by(samples, {"base": "b", "hidden_size": HIDDEN, "aux_hidden_size": 3 * HIDDEN})
    with pytest.raises(DataError, match="hidden_size is 4 there and 8 here"):
        require_made_by(samples, {"base": "b", "hidden_size": 8})
