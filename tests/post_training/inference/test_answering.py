"""Evaluations of a run in which the model answers, whatever the number of processes."""

import json

import pytest

from data.rows.converters import FormatOptions
from post_training.inference.backends import TransformersBackend
from post_training.inference.exact_match import evaluate, read_questions
from post_training.inference.generate import Sampling
from scripts.quickstart import vision as quickstart
from tests.helpers import vision
from tests.helpers.launch import finetune, start_finetune

TOKENS = 6


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Pictures of several sizes, and rows whose answers end at different tokens."""
    folder = tmp_path_factory.mktemp("seen")
    vision.save_model(folder / "model", "qwen2_5_vl")
    trained, held_out = quickstart.make_rows(0, 8, 5)
    quickstart.write_parquet(folder / "train.parquet", trained)
    quickstart.write_parquet(folder / "valid.parquet", held_out)
    return (
        *("--hf-model", str(folder / "model"), "--finetune-data-files", f"{folder}/train.parquet"),
        *("--valid-data-files", f"{folder}/valid.parquet", "--kind-key", "kind", "--fp32"),
        *("--data-cache-dir", f"{folder}/cache", "--seq-length", "256", "--lr", "1e-5"),
        *("--train-iters", "2", "--global-batch-size", "2", "--eval-interval", "2"),
    )


@pytest.mark.slow
def test_a_sharded_model_answers_as_its_export(words, tmp_path):
    flags = ("--answer-tokens", str(TOKENS))
    run = finetune(tmp_path / "out", *words, *flags, "--save-hf", world=2).ok()
    backend = TransformersBackend.load(str(run.folder / "hf"), Sampling(TOKENS), 1)
    file = words[words.index("--valid-data-files") + 1]
    scores = evaluate(backend, read_questions([file], FormatOptions(ignore_columns=("kind",))))
    written = json.loads((run.folder / "answers/valid-2.json").read_text())
    assert written["answers"] == scores.rows and len({row["answer"] for row in scores.rows}) > 1
    (found,) = run.evaluations
    kinds = {f"eval_accuracy/{kind}" if kind else "eval_accuracy" for kind in scores.by_kind()}
    assert kinds <= found.keys() and found["total"] == 5 and found["loss"] > 0
    # Kinds are in the column "kind" where no flag names another, so that it is read.
    unnamed = [word for word in words if word not in ("--kind-key", "kind")]
    alone = (*unnamed, *flags, "--eval-only", "--strict-columns")
    again = finetune(run.folder, *alone, world=2).ok()
    (alone,) = map(json.loads, (again.folder / "evaluations.jsonl").open())
    assert alone["eval_accuracy"] == found["eval_accuracy"] == scores.accuracy
    assert json.loads((run.folder / "answers/valid-2.json").read_text()) == written


def test_a_column_of_kinds_without_answers_is_refused(words, tmp_path):
    run = start_finetune(tmp_path, *words).wait()
    assert run.status == 2 and "does nothing without --answer-tokens" in run.console, run.console


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--eval-iters", "0"), "no rows of --valid-data-files or --test-data-files are evaluated"),
        (("--answer-tokens", "0"), "--answer-tokens"),
        (("--kind-key", "knd", "--ignore-columns", "kind"), "--kind-key knd: no row"),
    ],
)
def test_refused(words, tmp_path, flags, told):
    run = start_finetune(tmp_path, *words, "--answer-tokens", "3", *flags).wait()
    assert run.status == 2 and told in run.console, run.console
