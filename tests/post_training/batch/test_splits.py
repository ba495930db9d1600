import argparse
import json
import os
from types import SimpleNamespace

import pytest
import torch

from data import SFTDataset, prepare_documents
from data.arguments import add_data_arguments
from post_training.batch.data_report import describe
from post_training.batch.splits import Sources, Split, check_same_documents, prepare_data
from post_training.errors import SetupError
from tests.helpers import faults
from tests.helpers.launch import finetune, run_ranks
from tests.helpers.models import make_tokenizer
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

SEQ = 256


@pytest.fixture
def prepared(tmp_path):
    """A function from data flags to (what is printed, documents, cache folder)."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, column, count in (("a", "answer", 60), ("b", "output", 40)):
        rows = [
            json.dumps(
                {"instruction" if name == "b" else "question": f"Why {i}?", column: "so " * 9}
            )
            for i in range(count)
        ]
        if name == "a":
            rows[3] = "broken"
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")

    def prepare(*flags, hf_config=None):
        parser = add_data_arguments(argparse.ArgumentParser())
        args = parser.parse_args(
            [flag.replace("DIR", str(tmp_path)) for flag in flags]
            + ["--data-cache-dir", str(tmp_path / "cache"), "--on-bad-row", "skip"]
        )
        settings = {
            "seq_length": SEQ, "seed": 1, "global_batch_size": 2, "eval_global_batch_size": 2,
            "skip_train": False, "offline_distillation_data": None,
            "num_epochs": None, "vocab_size": None, "hf_tokenizer": str(tmp_path / "tokenizer"),
            "hf_model": None, "trust_remote_code": False, "hf_config": hf_config,
        }  # fmt: skip
        vars(args).update(settings)
        _, splits = prepare_data(args)
        documents = {name: split.documents for name, split in splits.items()}
        return describe(splits, args), documents, tmp_path

    return prepare


def test_a_mixture_shows_what_is_used_of_each_source(prepared):
    text, documents, folder = prepared(
        "--finetune-data-files", "DIR/a.jsonl=0.75", "DIR/b.jsonl=0.25"
    )
    used = documents["train"]
    mixture = used.report["mixture"]
    total, first, second = text.splitlines()
    tokens = sum(entry["tokens"] for entry in mixture.values())
    assert tokens < used.report["tokens"]  # a part of b.jsonl is left out
    assert f"{len(used)} documents, {tokens:,} tokens" in total
    listed = folder / "cache" / used.parts[0].fingerprint / "bad_rows.jsonl"
    assert first.startswith(f"train: {folder}/a.jsonl: format question, masks by marks; ")
    assert f"60 rows read, 59 kept, dropped: 1 bad JSON (listed in {listed})" in first
    assert "a.jsonl:4" in listed.read_text()
    assert "format alpaca" in second
    assert "dropped" not in second
    for line, entry in zip((first, second), mixture.values(), strict=True):
        share = f"{entry['achieved']:.2%} of the tokens ({entry['weight']:.2%} wanted)"
        assert line.endswith(f"; {entry['documents']} documents used, {share}")


def test_rows_too_long_to_be_evaluated_are_counted(prepared, tmp_path):
    """By default they are dropped from every split; nothing is left out of an evaluation in silence."""
    for split, long in (("valid", 2), ("test", 1)):
        rows = [{"question": "Why?", "answer": "so " * (300 if i < long else 9)} for i in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--valid-data-files", "DIR/valid.jsonl", "--test-data-files", "DIR/test.jsonl"]
    text, *_ = prepared("--finetune-data-files", "DIR/b.jsonl", *files)
    for split, long in (("valid", 2), ("test", 1)):
        (line,) = [each for each in text.splitlines() if each.startswith(f"{split}: {tmp_path}")]
        assert f"5 rows read, {5 - long} kept, dropped: {long} longer than --seq-length" in line


def test_a_split_shows_what_is_its_own(prepared):
    text, documents, _ = prepared(
        "--finetune-data-files", "DIR/a.jsonl", "--split-ratio", "0.5,0.5"
    )
    for split in ("train", "valid"):
        tokens = int(documents[split].lengths.sum())
        assert f"{split}: {len(documents[split])} documents, {tokens:,} tokens" in text
    assert 0 < len(documents["valid"]) < 59


def _compared(folder, spelling, rank_1):
    """Whether this rank finds that all have prepared the same documents."""
    torch.distributed.init_process_group("gloo")
    os.chdir(folder)
    name = [spelling, rank_1][torch.distributed.get_rank()]
    train = prepare_documents(
        files=[name], tokenizer=make_tokenizer(), seq_length=SEQ, cache_dir=None
    )
    packs = SFTDataset(None, train, make_tokenizer(), SEQ)
    try:
        check_same_documents({"train": Split(packs, Sources([], None))}, "cpu")
    except SetupError:
        return False
    return True


def test_ranks_compare_documents_and_not_paths(tmp_path):
    for name, answer in (("a", "so"), ("b", "so"), ("c", "no")):
        row = {"question": "Why?", "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert run_ranks(_compared, 2, tmp_path, "a.jsonl", f"{tmp_path}/b.jsonl") == [True, True]
    assert run_ranks(_compared, 2, tmp_path, "a.jsonl", "c.jsonl") == [False, False]


def test_documents_that_are_held_out_and_trained_are_counted_and_shown(prepared):
    files = ["--finetune-data-files", "DIR/a.jsonl", "--valid-data-files", "DIR/b.jsonl"]
    text, _, folder = prepared(*files)  # the same questions and answers, in other columns
    warning = next(line for line in text.splitlines() if "warning" in line)
    assert "valid: warning: 39 of 40 documents are in the training data too" in warning
    assert f"the first at {folder}/b.jsonl:1 (and {folder}/a.jsonl:1)" in warning
    rows = [json.dumps({"question": f"How {i}?", "answer": "yes"}) for i in range(9)]
    (folder / "b.jsonl").write_text("\n".join(rows) + "\n")
    assert "warning" not in prepared(*files)[0]


def test_a_run_plans_each_epoch_of_a_split_once_where_it_is_read(hf_model, tmp_path):
    """And how many packs there are is found out once on every rank."""
    counts = {"finetune": 60, "valid": 20, "test": 12}
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", make_rows(count, seed=count))
        for name, count in counts.items()
    }
    recipe = Recipe().flags()
    run = finetune(
        tmp_path / "out",
        *(
            "--hf-model",
            str(hf_model("qwen3")),
            "--tensor-model-parallel-size",
            "2",
            "--no-save-optim",
        ),
        *(word for name, file in files.items() for word in (f"--{name}-data-files", str(file))),
        *("--num-epochs", "2", *recipe[recipe.index("--global-batch-size") :]),
        world=2,
        environment={faults.PLANS: str(tmp_path / "plans")},
        inject=faults.count_plans,
    ).ok()
    assert {each["split"] for each in run.evaluations} == {"valid", "test"}
    made = sorted((tmp_path / "plans").read_text().splitlines())
    read = [
        f"0 plan_epoch {count} {epoch}" for count, epoch in ((60, 0), (60, 1), (20, 0), (12, 0))
    ]
    sized = [f"{rank} fill_packs {count} None" for rank in (0, 1) for count in counts.values()]
    assert made == sorted(read + sized)


def test_documents_beyond_the_models_length_are_told(prepared):
    """They are trained without a word otherwise, and the export says another limit than the base."""
    made_for = {n: SimpleNamespace(max_position_embeddings=n) for n in (SEQ, SEQ - 1)}
    told = {}
    for length, config in made_for.items():
        text, *_ = prepared("--finetune-data-files", "DIR/b.jsonl", hf_config=config)
        told[length] = [line for line in text.splitlines() if line.startswith("warning")]
    assert told[SEQ] == []
    (line,) = told[SEQ - 1]
    assert f"--seq-length {SEQ}: the model was made for {SEQ - 1} tokens" in line
    assert line.endswith(f"exported config.json says {SEQ}")
    yarn = SimpleNamespace(max_position_embeddings=SEQ - 1, rope_parameters={"rope_type": "yarn"})
    text, *_ = prepared("--finetune-data-files", "DIR/b.jsonl", hf_config=yarn)
    assert f"says {SEQ - 1}, by which its frequencies are scaled" in text
