"""`--eval-only`, and the losses of several sources apart: equal on every layout, no row dropped."""

import json
import math
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import faults, reference
from tests.helpers.launch import NO_PROCESS_GROUP, finetune
from tests.helpers.models import load_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

RECIPE = Recipe(steps=4)
LAYOUTS = {
    "one": ([], 1),
    "batch6-mbs3": (["--global-batch-size", "6", "--micro-batch-size", "3"], 1),
    "dp2": ([], 2),
    "cp2": (["--context-parallel-size", "2"], 2),
    "fsdp2": (["--use-torch-fsdp2"], 2),
    "tp2-sp": (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    # Larger micro batches than in training, on stages of two pieces each.
    "pp2-vpp2-eval2": (
        [
            *("--pipeline-model-parallel-size", "2", "--eval-micro-batch-size", "2"),
            *("--pipeline-model-parallel-layout", "E|t|t|L"),
        ],
        2,
    ),
    "unpacked": (["--packing", "none"], 1),
}
OTHERS = [pytest.param(name, marks=[] if name == "one" else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two sources of validation rows, and one to test on: (rows, file) by name."""
    folder = tmp_path_factory.mktemp("held_out")
    made = {
        "sums": make_rows(17, seed=1),
        "talk": make_rows(9, seed=2),
        "exam": make_rows(5, seed=3),
    }
    return {name: (rows, write_rows(folder / f"{name}.jsonl", rows)) for name, rows in made.items()}


@pytest.fixture(scope="module")
def truth(hf_model, held_out):
    """(mean loss, trained tokens) of each source by the HuggingFace model."""
    model = load_model(hf_model("qwen3"))
    return {name: reference.mean_loss(model, rows) for name, (rows, _) in held_out.items()}


@pytest.fixture(scope="module")
def words(hf_model, held_out):
    files = {name: str(file) for name, (_, file) in held_out.items()}
    return [
        *("--hf-model", str(hf_model("qwen3")), "--seq-length", "192", "--global-batch-size", "4"),
        *("--valid-data-files", files["sums"], files["talk"], "--test-data-files", files["exam"]),
    ]


def check(record, truth, names):
    total = sum(truth[name][0] * truth[name][1] for name in names)
    tokens = sum(truth[name][1] for name in names)
    assert record["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert record["tokens"] == tokens
    apart = record.get("sources", {})
    assert list(apart) == (names if len(names) > 1 else [])
    for name, found in apart.items():
        assert found["loss"] == pytest.approx(truth[name][0], rel=1e-6)
        assert found["tokens"] == truth[name][1]
    if apart:
        whole = sum(each["loss"] * each["tokens"] for each in apart.values())
        assert whole / record["tokens"] == pytest.approx(record["loss"], rel=1e-6)


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").open()]


@pytest.mark.parametrize("layout", OTHERS)
def test_a_huggingface_model_alone(words, truth, tmp_path, layout):
    """Token-weighted over the whole split, and no optimizer is built."""
    flags, world = LAYOUTS[layout]
    run = finetune(
        tmp_path / "out", *words, "--eval-only", *flags, world=world, inject=faults.no_optimizer
    ).ok()
    valid, test = evaluations(run.folder)
    assert (valid["split"], test["split"]) == ("valid", "test")
    check(valid, truth, ["sums", "talk"])
    check(test, truth, ["exam"])
    assert "valid loss" in run.console and "sums " in run.console and "test loss" in run.console
    made = {path.name for path in run.folder.iterdir()}
    assert made == {"evaluations.jsonl", "eval.log", "checkpoints"}
    assert not any((run.folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(words, chat_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    data = ["--finetune-data-files", str(chat_data.file)]
    flags = [*data, *RECIPE.flags(), "--no-save-optim", "--eval-at-start"]
    return finetune(folder, *words, *flags).ok()


@pytest.mark.slow
def test_at_the_start_of_a_run_the_model_is_as_it_was(trained, truth):
    first, *later = trained.evaluations
    assert (first["split"], first["iteration"]) == ("valid", 0)
    check(first, truth, ["sums", "talk"])
    assert [(r["split"], r["iteration"]) for r in later] == [("valid", 4), ("test", 4)]
    assert later[0]["loss"] < first["loss"] and len(trained.steps) == RECIPE.steps


@pytest.mark.slow
def test_the_newest_checkpoint_of_a_run_which_is_left_as_it_is(words, trained, tmp_path):
    before = {path: path.read_bytes() for path in trained.folder.iterdir() if path.is_file()}
    split = ["--pipeline-model-parallel-size", "2"]
    finetune(trained.folder, *words, "--eval-only", *split, world=2).ok()
    assert all(path.read_bytes() == content for path, content in before.items())
    of_run = {record["split"]: record for record in trained.evaluations}
    for record in evaluations(trained.folder):
        expected = of_run[record["split"]]
        assert record["iteration"] == RECIPE.steps
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert record["tokens"] == expected["tokens"]
        assert record["model"] == str(trained.folder / "checkpoints")
    # Named by --load, which comes before the folder's own.
    copy = shutil.copytree(trained.folder / "checkpoints", tmp_path / "copy")
    again = finetune(trained.folder, *words, "--eval-only", "--load", str(copy)).ok()
    first, second = evaluations(again.folder)[:2], evaluations(again.folder)[2:]
    assert [record["model"] for record in second] == [str(copy)] * 2
    assert [record["loss"] for record in second] == pytest.approx(
        [record["loss"] for record in first], rel=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--valid-data-files"),
        (["--valid-data-files", "exam", "--save-hf"], "--save-hf"),
    ],
)
def test_what_it_refuses(hf_model, held_out, tmp_path, flags, text):
    flags = [str(held_out[word][1]) if word in held_out else word for word in flags]
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(hf_model("qwen3")), "--eval-only", *flags),
        environment={NO_PROCESS_GROUP: "1"},
    )
    assert run.status == 2
    (line,) = run.console.splitlines()
    assert line.startswith("error: ") and text in line


def by_source(run):
    """Sums of the losses and tokens of each source over a run, after a look at each step."""
    sums = dict.fromkeys(("sums", "talk"), 0.0)
    tokens = dict.fromkeys(sums, 0)
    for step in run.steps:
        apart = step["sources"]
        assert list(apart) == list(sums)
        whole = sum((each["loss"] or 0) * each["tokens"] for each in apart.values())
        assert whole / step["trained_tokens"] == pytest.approx(step["lm_loss"], rel=1e-6)
        for name, each in apart.items():
            sums[name] += (each["loss"] or 0) * each["tokens"]
            tokens[name] += each["tokens"]
    assert sum(tokens.values()) == run.steps[-1]["total_trained_tokens"]
    return sums, tokens


@pytest.fixture(scope="module")
def mixture(hf_model, held_out):
    """Trains one epoch of a weighted mixture with learning rate 0: each row has one loss."""
    files = [f"{held_out[name][1]}={weight}" for name, weight in (("sums", 2), ("talk", 1))]

    def run(folder, layout):
        flags, world = LAYOUTS[layout]
        batch = [] if "--global-batch-size" in flags else ["--global-batch-size", "4"]
        return finetune(
            folder,
            *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", *files),
            *("--num-epochs", "1", "--seq-length", "192", "--lr", "0", "--no-save-optim"),
            *(*batch, *flags),
            world=world,
        ).ok()

    return run


@pytest.fixture(scope="module")
def run_on_one(mixture, tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture") / "out", "one")


def test_a_mixture_is_reported_apart_while_it_trains(run_on_one):
    _, tokens = by_source(run_on_one)
    assert tokens["sums"] > tokens["talk"] > 0
    events = EventAccumulator(str(run_on_one.folder / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("lm loss/talk")]
    expected = [
        (step["iteration"], pytest.approx(step["sources"]["talk"]["loss"]))
        for step in run_on_one.steps
        if step["sources"]["talk"]["tokens"]
    ]
    assert written == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_mixture_is_the_same_on_every_layout(mixture, run_on_one, tmp_path, layout):
    sums, tokens = by_source(mixture(tmp_path / "out", layout))
    expected = by_source(run_on_one)
    assert tokens == expected[1]
    assert sums == pytest.approx(expected[0], rel=1e-6)
