"""Which data goes on, and which is refused. That the numbers go on is in `tests/runs/test_resume.py`."""

import argparse
import hashlib
import importlib.metadata
import json
import shutil

import datasets
import pytest

from data import DocumentSet, add_data_arguments, prepare_documents, prepare_documents_from_args
from data.prepare import prepare
from post_training.checkpoint import store
from post_training.errors import SetupError
from post_training.hf.folder import local_model_folder, weights_digest
from tests.helpers.models import edit_json, make_tokenizer
from tests.helpers.positions import SEQ, begins_at, make_checkpoint, manifest_of, position_of


def test_the_checkpoint_says_where_in_the_data_it_is(saved, documents):
    facts = manifest_of(saved(28))
    packs = 24  # of the 60 documents, at this length
    assert facts["consumed_samples"] == 28
    assert (facts["data"]["epoch"], facts["data"]["pack"]) == divmod(28, packs)
    assert facts["data"]["contents"] == documents.contents
    assert len(facts["data"]["plan_hash"]) == 32


def test_the_same_data_goes_on(parse, documents, saved):
    checkpoint = saved(28)
    for flags in ([], ["--restart-data"], ["--micro-batch-size", "2"]):
        assert begins_at(parse(*SEQ, *flags), documents, checkpoint) == 0


def test_what_teaches_is_compared(parse, documents, saved):
    """Stored features may be exchanged as data may; a version before said nothing of it."""
    taught = {"teacher": "a", "features": {"base": "b"}}
    checkpoint = saved(28, teaching=taught)
    other = taught | {"features": {"base": "x"}}
    position_of(parse(*SEQ), documents, checkpoint, taught)
    position_of(parse(*SEQ, "--restart-data"), documents, checkpoint, other)
    for now, flags, told in (
        (other, (), "base is 'b' there and 'x' here"),
        (taught | {"teacher": "c"}, ("--restart-data",), "teacher is 'a' there and 'c' here"),
        ({}, ("--restart-data",), "teacher is 'a' there and None here"),
    ):
        with pytest.raises(SetupError, match=f"taught otherwise: {told}"):
            position_of(parse(*SEQ, *flags), documents, checkpoint, now)
    position_of(parse(*SEQ), documents, saved(28, iteration=6, teaching=None), taught)


def test_a_manifest_that_does_not_say_its_place_is_refused(parse, documents, saved):
    checkpoint = saved(28)
    file = checkpoint / store.MANIFEST
    said = json.loads(file.read_text())
    del said["manifest_crc32"]
    incomplete = [{k: v for k, v in said.items() if k != key} for key in ("data", "base_weights")]
    for manifest in (*incomplete, said | {"data": {}}):
        file.write_text(json.dumps(manifest))
        with pytest.raises(SetupError, match="manifest.json does not say where in which data"):
            position_of(parse(*SEQ), documents, checkpoint)


def test_more_epochs_of_the_same_data_go_on(parse, documents, saved):
    flags = ["--train-iters", "0", "--num-epochs"]
    checkpoint = saved(28, *flags, "2")
    position = position_of(parse(*SEQ, *flags, "3"), documents, checkpoint)
    assert (position.begins_at, position.train_iters) == (0, 18)


def test_warm_up_must_fit_into_the_epochs(parse, documents):
    """Whose steps are known only now."""
    args = parse(*SEQ, "--train-iters", "0", "--num-epochs", "1", "--lr-warmup-iters", "6")
    with pytest.raises(SetupError, match=r"at step 6 \(--num-epochs 1\); use fewer than 6"):
        position_of(args, documents, None)


def test_packs_that_filler_stands_for_are_told_of(parse, documents, saved, capsys):
    """A finished run that is given more epochs: its last batch was filled up behind the last one."""
    flags = ["--train-iters", "0", "--num-epochs"]
    checkpoint = saved(28, *flags, "1")  # 24 packs, and a batch of filler
    position_of(parse(*SEQ, *flags, "1"), documents, checkpoint)
    assert capsys.readouterr().err == ""
    position_of(parse(*SEQ, *flags, "2"), documents, checkpoint)
    assert "held 4 empty packs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seq-length", "200"], "--seq-length was 192, now 200"),
        (["--seed", "7"], "--seed was 1234, now 7"),
        (["--packing", "none"], "--packing was best-fit, now none"),
    ],
    ids=["seq-length", "seed", "packing"],
)
def test_another_plan_is_refused(parse, documents, saved, flags, told):
    checkpoint = saved(8)
    with pytest.raises(SetupError, match=told + ".*--restart-data"):
        position_of(parse(*SEQ, *flags), documents, checkpoint)
    assert begins_at(parse(*SEQ, *flags, "--restart-data"), documents, checkpoint) == 8


def test_other_data_is_refused_even_in_a_copied_checkpoint(parse, other_documents, saved, tmp_path):
    checkpoint = saved(8)
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ), other_documents, checkpoint)
    copied = checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ, out="new"), other_documents, copied)


@pytest.fixture
def folder(chat_data, tmp_path):
    """A folder `data` with two files of rows, a link to it, and a copy that was moved."""
    lines = chat_data.file.read_text().splitlines(keepends=True)
    for name in ("data", "moved"):
        (tmp_path / name).mkdir()
        for part in range(2):
            (tmp_path / name / f"{part}.jsonl").write_text("".join(lines[part::2]))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    return tmp_path


def prepared(folder, *flags, data="data", cache="cache"):
    """Documents of the flags, and the arguments that they were prepared with."""
    parser = add_data_arguments(argparse.ArgumentParser())
    parser.add_argument("--seq-length", type=int, default=192)
    words = ["--finetune-data-files", f"{folder}/{data}", "--data-cache-dir", f"{folder}/{cache}"]
    args = parser.parse_args([*words, *flags])
    documents = prepare_documents_from_args(args, "train", make_tokenizer())
    assert documents is not None
    return documents


def relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return prepared(".")


def other_library(folder, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1")
    return prepared(folder)


def other_code(folder, monkeypatch):
    monkeypatch.setattr(prepare, "_code_hash", lambda: "another")
    return prepared(folder)


def other_template_text(folder, monkeypatch):
    template = "{# the same #}" + make_tokenizer().chat_template
    return prepared(folder, "--chat-template", template)


def as_dataset(folder, monkeypatch):
    rows = [
        json.loads(line)
        for part in range(2)
        for line in (folder / "data" / f"{part}.jsonl").read_text().splitlines()
    ]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return prepare_documents(
        hf_dataset=str(folder / "saved"), tokenizer=make_tokenizer(), seq_length=192, cache_dir=None
    )


@pytest.mark.parametrize(
    ("again", "told"),
    [
        (relative, "path (FOLDER/data/0.jsonl, FOLDER/data/1.jsonl, now data/0.jsonl, data/1.jsonl)"),
        (lambda f, _: prepared(f, data="link"), "now FOLDER/link/0.jsonl, FOLDER/link/1.jsonl)"),
        (lambda f, _: prepared(f, data="moved"), "now FOLDER/moved/0.jsonl, FOLDER/moved/1.jsonl)"),
        (lambda f, _: prepared(f, cache="elsewhere"), None),
        (lambda f, _: prepared(f, "--data-workers", "2"), None),
        (lambda f, _: prepared(f, "--overlong", "error"), "this differs: data flags"),
        (other_library, "now tokenizers 99.1, jinja2 99.1)"),
        (other_code, "this differs: code of this project"),
        (other_template_text, "this differs: chat template"),
        (as_dataset, "now FOLDER/saved[train])"),
    ],
    ids=["relative", "link", "moved", "cache", "workers", "flags", "library", "code", "template", "hub"],
)  # fmt: skip
def test_the_same_documents_go_on_whatever_they_are_made_of(
    parse, saved, folder, monkeypatch, capsys, again, told
):
    checkpoint = saved(8, of=prepared(folder))
    documents = again(folder, monkeypatch)
    capsys.readouterr()
    assert begins_at(parse(*SEQ), documents, checkpoint) == 0
    said = capsys.readouterr().err.replace(str(folder), "FOLDER").splitlines()
    assert len(said) == (told is not None)
    assert told is None or (said[0].startswith("note: the documents are") and told in said[0])


@pytest.mark.parametrize("flags", [["--split-ratio", "0.9,0.1"], ["WEIGHTED"]])
def test_the_same_choice_of_the_same_documents_goes_on(parse, saved, folder, capsys, flags):
    def chosen(data, weights):
        if flags != ["WEIGHTED"]:
            return prepared(folder, *flags, data=data)
        files = [f"{folder}/{data}/{part}.jsonl={weight}" for part, weight in enumerate(weights)]
        return prepared(folder, "--finetune-data-files", *files)

    checkpoint = saved(8, of=chosen("data", (1, 2)))
    assert begins_at(parse(*SEQ), chosen("link", (2, 4)), checkpoint) == 0
    assert "FOLDER/link/0.jsonl" in capsys.readouterr().err.replace(str(folder), "FOLDER")
    flags = flags if flags == ["WEIGHTED"] else ["--split-ratio", "0.8,0.2"]
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ), chosen("data", (2, 1)), checkpoint)


def test_a_template_that_renders_otherwise_is_refused(parse, saved, folder):
    checkpoint = saved(8, of=prepared(folder))
    template = make_tokenizer().chat_template.replace("'<|im_start|>'", "' <|im_start|>'")
    assert template != make_tokenizer().chat_template
    documents = prepared(folder, "--chat-template", template)
    with pytest.raises(SetupError, match=r"the training data differs.*--restart-data"):
        position_of(parse(*SEQ), documents, checkpoint)


@pytest.mark.parametrize("kind", ["plain", "split", "mixture"])
def test_a_checkpoint_of_a_version_before_is_compared_with_its_cache(
    parse, saved, folder, capsys, kind
):
    """Whose manifest names its documents by token caches and by what chose from them."""
    files = [f"{folder}/data/0.jsonl=1", f"{folder}/data/1.jsonl=2.0"]
    flags: dict[str, list[str]] = {
        "plain": [],
        "split": ["--split-ratio", "0.9,0.1"],
        "mixture": ["--finetune-data-files", *files],
    }
    documents = prepared(folder, *flags[kind])
    checkpoint = saved(8, of=documents)
    parts = documents.parts if isinstance(documents, DocumentSet) else [documents]
    for number, part in enumerate(parts):
        (folder / "cache" / part.fingerprint).rename(folder / f"cache/old{number}")
        edit_json(folder / f"cache/old{number}/manifest.json", contents=None, crc32=None)
    name = {
        "plain": "old0",
        "split": named("old0 [np.float64(0.9), np.float64(0.1), np.float64(0.0)] 0"),
        "mixture": named("old0 1.0 1234 old1 2.0 1234 "),
    }[kind]
    data = manifest_of(checkpoint)["data"]
    plan = [2, name, 192, 1234, "best-fit", True, 4]
    for key in ("contents", "made_of"):
        del data[key]
    data |= {"documents": name, "plan_hash": named(json.dumps(plan))}
    edit_json(checkpoint / store.MANIFEST, data=data, manifest_crc32=None)

    words = [*SEQ, "--data-cache-dir", f"{folder}/cache"]
    capsys.readouterr()
    assert begins_at(parse(*words), documents, checkpoint) == 0
    assert f"compared with token cache {name}" in capsys.readouterr().err

    edit_json(checkpoint / store.MANIFEST, data=data | {"plan_hash": "of another plan"})
    with pytest.raises(SetupError, match="packs are planned in another way"):
        position_of(parse(*words), documents, checkpoint)

    gone = rf"token cache {name} .* is not in {folder}/cache .*--restart-data"
    with (folder / "cache/old0/loss_mask.bin").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(SetupError, match="training data differs" if kind == "plain" else gone):
        position_of(parse(*words), documents, checkpoint)
    shutil.rmtree(folder / "cache/old0")
    with pytest.raises(SetupError, match=gone):
        position_of(parse(*words), documents, checkpoint)
    assert begins_at(parse(*words, "--restart-data"), documents, checkpoint) == 8


def named(text):
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def test_another_global_batch_is_refused(parse, documents, saved):
    checkpoint = saved(8)
    for flags in ([], ["--restart-data"]):
        with pytest.raises(SetupError, match=r"--global-batch-size 4, this run's is 8"):
            args = parse(*SEQ, "--global-batch-size", "8", *flags)
            position_of(args, documents, checkpoint)


def test_other_base_weights_are_refused_in_the_own_folder_only(parse, documents, saved):
    checkpoint = saved(8, base_weights="of another model")
    with pytest.raises(SetupError, match="other weights than those of --hf-model"):
        position_of(parse(*SEQ), documents, checkpoint)
    assert begins_at(parse(*SEQ, out="new"), documents, checkpoint) == 0
    args = parse(*SEQ)
    kept = weights_digest(local_model_folder(args.hf_model), like="of a version before")
    checkpoint = saved(8, base_weights=kept)
    assert begins_at(args, documents, checkpoint) == 0  # not refused


def test_restarted_data_is_not_restarted_again(parse, documents, other_documents, saved, tmp_path):
    """The same command, given again, continues."""
    checkpoint = saved(8, out="old")
    args = parse(*SEQ, "--restart-data", "--load", str(checkpoint.parent))
    position = position_of(args, other_documents, checkpoint)
    assert position.begins_at == 8
    args.consumed_train_samples = 20
    args.virtual_pipeline_model_parallel_size = None
    own = make_checkpoint(tmp_path / "out/checkpoints", 7, position.facts())
    assert manifest_of(own)["data"]["pack"] == 12
    assert begins_at(args, other_documents, own) == 8
    assert begins_at(parse(*SEQ), other_documents, own) == 8, "without the flag too"


def test_epochs_count_from_where_the_data_began_anew(parse, other_documents, saved):
    checkpoint = saved(8)
    words = ["--restart-data", "--train-iters", "0", "--num-epochs", "2"]
    args = parse(*SEQ, *words)
    position = position_of(args, other_documents, checkpoint)
    plan = position.data.plan
    assert position.train_iters == 8 // 4 + -(-2 * plan.packs_per_epoch() // 4)


def test_a_manifest_that_contradicts_itself_is_refused(parse, documents, saved):
    """One of an older version, which has no check sum of its own."""
    checkpoint = saved(8)
    edit_json(checkpoint / store.MANIFEST, consumed_samples=12, manifest_crc32=None)
    with pytest.raises(SetupError, match="manifest.json has been changed"):
        position_of(parse(*SEQ), documents, checkpoint)
