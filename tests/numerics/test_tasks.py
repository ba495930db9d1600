"""Tasks of one's own against plain loops: the same losses on any number of processes, and after a resume.

Faults of other trainers that these tests fail on: a mean of micro batches' means; an evaluation that drops
the last batch, or takes batches times their size for rows; rows repeated or left out after a resume.
"""

import json
import random
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import SFTDataset
from post_training.metrics.records import OWN_FIELDS
from post_training.tasks.rows import numbered
from tests.helpers import chat_task, vision
from tests.helpers.launch import ROOT, finetune, start_finetune
from tests.helpers.models import load_model, make_tokenizer

STEPS = 4
BATCH = 6
CHAT = ("--task", f"{ROOT / 'tests/helpers/chat_task.py'}:ChatTask")


@pytest.fixture(scope="module")
def flags(hf_model, chat_data):
    return (
        *(*CHAT, "--hf-model", str(hf_model("gpt2")), "--fp32", "--log-interval", "1"),
        *("--finetune-data-files", str(chat_data.file), "--valid-data-files", str(chat_data.file)),
        *("--train-iters", str(STEPS), "--global-batch-size", str(BATCH), "--lr", "1e-3"),
        *("--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--eval-interval", "100"),
    )


def plain_losses(folder, file):
    """Mean loss over the labels of each step's rows, one row at a time, by torch's Adam."""
    torch.manual_seed(0)
    model = load_model(folder).train()
    rows = chat_task.Rows([file], make_tokenizer())
    documents = SFTDataset(0, numbered(len(rows)), 0, 1, packing="none", global_batch_size=BATCH)
    plan = documents.shard(num_packed_samples=STEPS * BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    losses, norms = [], []
    for step in range(STEPS):
        chosen = [int(plan.document_indices(step * BATCH + i)[0]) for i in range(BATCH)]
        batches = [chat_task.collate([rows[row]]) for row in chosen]
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch).loss * count / labels
            loss.backward()
            total += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 3), (2, 1), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_losses_are_those_of_a_plain_loop(flags, hf_model, chat_data, tmp_path, world, micro):
    sizes = ("--micro-batch-size", str(micro), "--weight-decay", "0")
    run = finetune(tmp_path, *flags, *sizes, world=world).ok()
    losses, norms = plain_losses(hf_model("gpt2"), chat_data.file)
    assert run.losses == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in run.steps] == pytest.approx(norms, rel=1e-5)
    (evaluation,) = run.evaluations
    assert evaluation["total"] == 60 and "loss" not in evaluation
    # A task may say how many tokens are right, which a run without one counts; nothing else of these.
    assert run.steps[0].keys() - OWN_FIELDS == {"token_accuracy"}


@pytest.mark.slow
def test_a_task_goes_on_where_it_stopped_in_another_number_of_processes(flags, tmp_path):
    """So does its evaluation, of the run and of its checkpoint alone (`--eval-only`)."""
    whole = finetune(tmp_path / "whole", *flags, "--micro-batch-size", "2")
    (of_run,) = whole.evaluations
    assert 0 < of_run["correct"] < of_run["total"]
    events = EventAccumulator(str(whole.folder / "tensorboard")).Reload()
    (shown,) = [
        events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if "accuracy" in tag
    ]
    assert shown == pytest.approx(of_run["eval_accuracy"])
    alone = finetune(tmp_path / "whole", *flags[:-2], "--eval-only", world=2).ok()
    (record,) = map(json.loads, (alone.folder / "evaluations.jsonl").open())
    assert [record[k] for k in ("correct", "total")] == [of_run[k] for k in ("correct", "total")]
    finetune(tmp_path / "cut", *flags, "--micro-batch-size", "2", "--exit-interval", "1", world=3)
    cut = finetune(tmp_path / "cut", *flags, "--micro-batch-size", "6")
    assert len(cut.losses) == STEPS and cut.losses == pytest.approx(whole.losses, rel=1e-5)


def test_the_task_of_the_documentation_learns_and_its_best_checkpoint_stays(tmp_path):
    text = (ROOT / "docs" / "your_own_task.md").read_text()
    (code,) = re.findall(r"```python\n(# my_task.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_task.py").write_text(code)
    random.seed(0)
    for name, count in (("train", 203), ("valid", 53)):
        numbers = [random.randrange(10) for _ in range(count)]
        lines = [json.dumps({"numbers": [n], "even": int(n % 2 == 0)}) + "\n" for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    run = finetune(
        tmp_path / "out",
        *("--task", f"{tmp_path / 'my_task.py'}:MyTask", "--lr", "1e-2"),
        *("--finetune-data-files", str(tmp_path / "train.jsonl")),
        *("--valid-data-files", str(tmp_path / "valid.jsonl"), "--eval-interval", "3"),
        *("--train-iters", "60", "--global-batch-size", "8", "--micro-batch-size", "4"),
        *("--early-stop-metric", "eval_accuracy", "--early-stop-patience", "2"),
        *("--keep-checkpoints", "1", "--save-interval", "100"),
        world=2,
    )
    evaluations = run.ok().evaluations
    assert {record["total"] for record in evaluations} == {53}
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    shares = [record["eval_accuracy"] for record in evaluations]
    assert best["value"] == max(shares) == 1.0
    first = shares.index(1.0)
    assert best["iteration"] == 3 * (first + 1) and len(shares) == first + 3
    kept = {path.name for path in (tmp_path / "out" / "checkpoints").glob("iter_*")}
    assert kept == {f"iter_{3 * (first + n):07d}" for n in (1, 3)}
    assert "no better eval_accuracy in 2 evaluations" in run.console


FAULTY = """
import torch
from docs_task import MyTask
class NoLabels(MyTask):
    def get_train_model_output(self, batch):
        return super().get_train_model_output(batch)[0], 0
class Elsewhere(MyTask):
    def get_train_model_output(self, batch):
        return torch.ones(1, requires_grad=True).sum()
class SameName(MyTask):
    def get_train_model_output(self, batch):
        return super().get_train_model_output(batch), {"iteration": 7}
class CountsNothing(MyTask):
    def get_eval_model_output(self, batch):
        return 0, 0
"""


@pytest.mark.parametrize(
    ("name", "flags", "status", "told"),
    [
        ("NoLabels", (), 0, "step 1: nothing was trained"),
        ("Elsewhere", (), 1, "error: no weight has a gradient"),
        ("Elsewhere", ("--fsdp-sharding", "none"), 1, "error: no weight has a gradient"),
        ("SameName", (), 1, r"'iteration', which metrics.jsonl has of its own"),
        ("CountsNothing", (), 0, "step 1: get_eval_model_output counted nothing of valid"),
    ],
)
def test_what_a_task_does_not_mean_is_told(tmp_path, name, flags, status, told):
    text = (ROOT / "docs" / "your_own_task.md").read_text()
    (code,) = re.findall(r"```python\n(# my_task.*?)```", text, re.DOTALL)
    (tmp_path / "docs_task.py").write_text(code)
    (tmp_path / "faulty.py").write_text(FAULTY)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"numbers": [{n}], "even": {1 - n % 2}}}\n' for n in range(8)))
    data = ("--finetune-data-files", str(rows), "--valid-data-files", str(rows))
    sizes = ("--train-iters", "1", "--global-batch-size", "4", "--eval-interval", "1")
    task = ("--task", f"{tmp_path / 'faulty.py'}:{name}", "--lr", "1e-2", "--log-interval", "1")
    run = start_finetune(tmp_path / "out", *task, *data, *sizes, *flags).wait()
    assert run.status == status and re.search(told, run.console), run.console


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_the_own_task_in_three_methods_is_the_run_without_one(hf_model, chat_data, tmp_path, kind):
    model, data = tmp_path / kind, chat_data.file
    if kind == "gpt2":
        model = hf_model(kind)
    else:
        vision.save_model(model, kind)
        vision.make_rows(tmp_path / "data", 30, 0.25)
        data = tmp_path / "data" / "rows.jsonl"
    lines = data.read_text().splitlines()
    held_out = data.with_name("held_out.jsonl")
    held_out.write_text("\n".join(lines[:7]) + "\n")
    flags = (
        *("--hf-model", str(model), "--fp32", "--seq-length", "160", "--lr", "1e-3"),
        *("--finetune-data-files", str(data), "--valid-data-files", str(held_out)),
        *("--train-iters", "3", "--global-batch-size", "6", "--log-interval", "1"),
        *("--eval-interval", "3", "--conversation-format", "messages"),
    )
    task = ("--task", "post_training.tasks.conversations:Conversations")
    packed = finetune(tmp_path / "run", *flags, "--micro-batch-size", "3", "--packing", "none").ok()
    rows = finetune(tmp_path / "task", *flags, *task, "--micro-batch-size", "1", world=2).ok()
    assert len(rows.losses) == 3 and rows.losses == pytest.approx(packed.losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in run.steps] for run in (packed, rows)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    known, found = packed.evaluations[-1], rows.evaluations[-1]
    assert found["total"] == known["tokens"]
    assert found["eval_accuracy"] == pytest.approx(known["token_accuracy"])


def test_answers_of_a_sharded_model_are_those_of_one_process(flags, tmp_path):
    task = ("--task", f"{ROOT / 'tests/helpers/chat_task.py'}:GeneratingTask", "--train-iters", "1")
    found = []
    for world in (1, 2):
        # Behind a step, whose backward pass has given every weight back.
        sizes = ("--micro-batch-size", "1")
        run = finetune(tmp_path / str(world), *flags, *task, *sizes, world=world).ok()
        (evaluation,) = run.evaluations
        found.append((evaluation["correct"], evaluation["total"]))
    assert found[0] == found[1] and 0 < found[0][0] < found[0][1] == 97 * 60


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The flags of a task of `helpers/own_models.py`, without its name."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"numbers": [n % 10], "even": int(n % 2 == 0)} for n in range(23)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "rows.jsonl")
    return (
        *("--finetune-data-files", data, "--valid-data-files", data, "--eval-interval", "2"),
        *("--train-iters", "4", "--global-batch-size", "6", "--micro-batch-size", "3"),
        *("--lr", "1e-2", "--log-interval", "1"),
    )


def of_own(name):
    return "--task", f"{ROOT / 'tests/helpers/own_models.py'}:{name}"


def test_a_model_of_ones_own_with_dropout_goes_on_bit_for_bit(own, tmp_path):
    words = (*of_own("Dropping"), *own)
    whole = finetune(tmp_path / "whole", *words, world=2).ok()
    finetune(tmp_path / "cut", *words, "--exit-interval", "3", world=2)
    cut = finetune(tmp_path / "cut", *words, world=2).ok()
    assert cut.losses == whole.losses
    assert cut.evaluations[-1]["correct"] == whole.evaluations[-1]["correct"]


def test_blocks_that_share_a_weight_are_trained_alike_on_any_number_of_processes(own, tmp_path):
    runs = [
        finetune(tmp_path / str(world), *of_own("Tied"), *own, world=world).ok() for world in (1, 2)
    ]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in run.steps] for run in runs]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_ranks_that_make_other_weights_train_those_of_the_first(own, tmp_path):
    words = (*of_own("OtherWeights"), *own, "--fsdp-sharding", "none")
    runs = [finetune(tmp_path / str(world), *words, world=world).ok() for world in (1, 2)]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)


def test_every_rank_evaluates_by_the_statistics_that_are_saved(own, tmp_path):
    words = (*of_own("Statistics"), *own)
    run = finetune(tmp_path, *words, world=2).ok()
    told = finetune(tmp_path, *words, "--eval-only").ok()
    (line,) = (told.folder / "evaluations.jsonl").read_text().splitlines()
    shares = [record["eval_accuracy"] for record in (run.evaluations[-1], json.loads(line))]
    assert shares[1] == pytest.approx(shares[0], rel=1e-6)


def test_what_one_rank_meets_alone_is_told_by_it(own, tmp_path):
    run = finetune(tmp_path / "run", *of_own("LoneMistake"), *own, world=2)
    assert all(run.statuses)
    said = (tmp_path / "run.console1").read_text()
    assert "error on rank 1" in said and "100 right of a batch of 3 rows" in said
