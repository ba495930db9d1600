import argparse
import json

import pytest

from data.arguments import add_data_arguments
from data.documents.mixture import DocumentSet
from data.errors import DataError
from data.prepare.splits import parse_weighted, prepare_documents_from_args, training_sources
from tests.data.conftest import make_rows


def parse(tmp_path, *flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-length", type=int, default=256)
    add_data_arguments(parser)
    return parser.parse_args(["--data-cache-dir", str(tmp_path / "cache"), *map(str, flags)])


@pytest.fixture
def files(tmp_path):
    paths = []
    for number, count in enumerate((300, 60, 30)):
        path = tmp_path / f"{number}.jsonl"
        rows = make_rows(count, number)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths


def prepare(tokenizer, tmp_path, split, *flags):
    return prepare_documents_from_args(parse(tmp_path, *flags), split, tokenizer)


def texts(documents):
    return {documents[i][0].tobytes() for i in range(len(documents))}


def test_each_split_comes_from_its_own_flag(tokenizer, tmp_path, files):
    flags = ("--finetune-data-files", files[0], "--valid-data-files", files[1])
    assert len(prepare(tokenizer, tmp_path, "train", *flags)) == 300
    assert len(prepare(tokenizer, tmp_path, "valid", *flags)) == 60
    assert prepare(tokenizer, tmp_path, "test", *flags) is None


def test_split_ratio_cuts_disjoint_splits_that_cover_all(tokenizer, tmp_path, files):
    # The same rows twice: equal documents stay in one split.
    double = tmp_path / "double.jsonl"
    double.write_text(files[0].read_text() * 2)
    flags = ("--finetune-data-files", double, "--split-ratio", "0.8,0.1,0.1")
    parts = [prepare(tokenizer, tmp_path, split, *flags) for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == 600
    assert len(texts(parts[0]) | texts(parts[1]) | texts(parts[2])) == sum(
        len(texts(part)) for part in parts
    )
    assert 0.7 < len(parts[0]) / 600 < 0.9
    assert len({part.contents for part in parts}) == 3


def test_split_that_gets_no_row_is_refused(tokenizer, tmp_path, files):
    flags = ("--finetune-data-files", files[2], "--split-ratio")
    for split in ("train", "valid", "test"):
        with pytest.raises(
            DataError, match=r"--split-ratio 0.9999,0.0001: no row of 30 .* valid split"
        ):
            prepare(tokenizer, tmp_path, split, *flags, "0.9999,0.0001")
    assert prepare(tokenizer, tmp_path, "test", *flags, "0.5,0.5") is None
    assert len(prepare(tokenizer, tmp_path, "train", *flags, "1,0,0")) == 30
    assert prepare(tokenizer, tmp_path, "valid", *flags, "1,0,0") is None


def test_no_file_is_a_copy_of_another(tokenizer, tmp_path, files):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(files[0].read_bytes())
    flags = ("--finetune-data-files", files[0], "--valid-data-files", copy)
    for split in ("train", "valid"):
        with pytest.raises(DataError, match=f"--valid-data-files {copy}: a copy of {files[0]}"):
            prepare(tokenizer, tmp_path, split, *flags)
    copy.write_bytes(files[0].read_bytes().replace(b"why", b"who"))  # of the same size
    assert len(prepare(tokenizer, tmp_path, "valid", *flags)) == 300
    copy.write_bytes(files[1].read_bytes())
    for within in ((files[1], copy), (f"{files[1]}=1", f"{copy}=1")):
        with pytest.raises(DataError, match=f"{copy}: a copy of {files[1]}, .*trained twice"):
            prepare(tokenizer, tmp_path, "train", "--finetune-data-files", *within)


def test_a_dataset_and_files_are_mixed_by_weight(tokenizer, tmp_path, files):
    import datasets

    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "hub")
    flags = ["--finetune-data-files", f"{files[0]}=3", "--finetune-hf-dataset", f"{tmp_path}/hub=1"]
    assert training_sources(parse(tmp_path, *flags)) == [str(files[0]), f"{tmp_path}/hub"]
    mixture = prepare(tokenizer, tmp_path, "train", *flags)
    shares = mixture.report["mixture"]
    assert shares[f"{tmp_path}/hub"]["achieved"] == pytest.approx(0.25, abs=0.01)
    assert shares[str(files[0])]["documents"] == int((mixture.part_of == 0).sum())


def test_weighted_sources_get_their_share_of_tokens(tokenizer, tmp_path, files):
    flags = ("--finetune-data-files", f"{files[0]}=3", f"{files[1]}=1")
    mixture = prepare(tokenizer, tmp_path, "train", *flags)
    assert isinstance(mixture, DocumentSet)
    shares = mixture.report["mixture"]
    assert shares[str(files[0])]["achieved"] == pytest.approx(0.75, abs=0.01)
    assert shares[str(files[1])]["documents"] == 60
    lengths = [len(mixture[i][0]) for i in range(len(mixture))]
    assert mixture.lengths.tolist() == lengths
    assert mixture.report["read"] == 360


def test_equals_sign_in_an_existing_name_is_no_weight(tmp_path):
    path = tmp_path / "a=1.jsonl"
    path.touch()
    assert parse_weighted([str(path), "b.jsonl=0.5", "c=d.jsonl"]) == [
        (str(path), None),
        ("b.jsonl", 0.5),
        ("c=d.jsonl", None),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no training data: give --finetune-data-files"),
        (["--finetune-data-files", "{0}", "--valid-data-files", "{0}"], "also in --finetune-data"),
        (["--finetune-data-files", "{0}", "--valid-data-files", "{1}", "--split-ratio", "1,1"],
         "either --split-ratio or --valid"),
        (["--finetune-data-files", "{0}", "--split-ratio", "1"], "--split-ratio 1: expected two"),
        (["--finetune-data-files", "{0}", "--split-ratio", "-1,2"], "--split-ratio"),
        (["--finetune-data-files", "{0}", "--split-ratio", "inf,1"], "shares of 0 or more"),
        (["--finetune-data-files", "{0}", "--split-ratio", "0,1"], "fell into the train split"),
        (["--finetune-data-files", "{0}", "--split-ratio", "0.5,0.6"], "add up to 1.1; they must"),
        (["--finetune-data-files", "{0}", "--finetune-data-split", "x"], "-split x: only --fine"),
        (["--finetune-data-files", "{0}=1", "{1}"], "give every source a weight"),
        (["--finetune-data-files", "{0}=0", "{1}=1"], "0.jsonl=0: a weight .* greater than 0"),
        (["--finetune-data-files", "{0}", "--valid-data-files", "x=nan"], "x=nan: a weight must"),
        (["--finetune-data-files", "{0}=1", "{0}=1"], "0.jsonl is in .*0.jsonl as well"),
        (["--finetune-data-files", "{0}=1", "{folder}/*.jsonl=1"], "0.jsonl is in .*0.jsonl as well"),
        (["--finetune-data-files", "{folder}=1", "{folder}/../{folder.name}/2.jsonl=1"], "as well"),
        (["--finetune-hf-dataset", "some/name", "--finetune-data-files", "{0}=1", "{1}=1"],
         "--finetune-hf-dataset some/name: give every source a weight"),
        (["--finetune-hf-dataset", "some/name=1", "--finetune-data-files", "{0}"],
         "--finetune-data-files .*0.jsonl: give every source a weight"),
        (["--finetune-hf-dataset", "some/name", "--finetune-data-files", "{0}"], "give either"),
        (["--finetune-data-files", "{0}", "--valid-data-files", "gone"], "--valid-data-files gone"),
        (["--finetune-data-files", "{0}", "--chat-template-variables", "7"], "JSON object"),
        (["--finetune-data-files", "{0}", "--chat-template-variables", '{{"a": NaN}}'], "not valid"),
        (["--finetune-data-files", "{0}", "--chat-template-variables", "[" * 9999], "not valid JSON"),
        *((["--finetune-data-files", "{0}", "--chat-template-variables", json.dumps({name: 3})],
           f"{name} is set by the rendering")
          for name in ("messages", "add_generation_prompt", "eos_token", "namespace")),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_by_name(tokenizer, tmp_path, files, flags, message):
    flags = [f if f[:2] == '{"' else f.format(*files, folder=tmp_path) for f in flags]
    if "-1,2" in flags:
        flags[-2:] = ["--split-ratio=-1,2"]
    with pytest.raises(DataError, match=message):
        prepare(tokenizer, tmp_path, "train", *flags)


def test_flags_that_the_host_parser_has_are_left_alone(tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--chat-template", default="theirs")
    add_data_arguments(parser)
    assert parser.parse_args([]).chat_template == "theirs"


@pytest.mark.slow
def test_no_flag_clashes_with_megatron():
    arguments = pytest.importorskip("megatron.training.arguments")
    host, own = argparse.ArgumentParser(), argparse.ArgumentParser()
    arguments.add_megatron_arguments(host)
    add_data_arguments(own)
    theirs = {action.dest for action in host._actions}
    shared = {action.dest for action in own._actions} & theirs
    assert shared == {"help", "chat_template"}
    add_data_arguments(host)
