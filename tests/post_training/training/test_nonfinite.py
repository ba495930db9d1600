"""A loss or gradient that is not finite stops the run before the weights see it, and names the row."""

import pytest

from tests.helpers import faults
from tests.helpers.checkpoint import newest_whole
from tests.helpers.launch import finetune
from tests.helpers.models import make_tokenizer
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

RECIPE = Recipe(steps=8)
# In step 4, on the second of two data parallel ranks; its end on the other half of context parallel ranks.
ROW = 55
MARK = "\u03a9"


@pytest.fixture(scope="module")
def spoilt(hf_model, tmp_path_factory):
    """The words of a run on rows of which one has a token that no other has, and that token."""
    rows = make_rows(60)
    rows[ROW]["messages"][-1]["content"] += f" {MARK}"
    folder = tmp_path_factory.mktemp("spoilt")
    file = write_rows(folder / "rows.jsonl", rows)
    tokenizer = make_tokenizer()
    ids = [set(tokenizer.encode(str(row["messages"][-1]["content"]))) for row in rows]
    (token, *_) = ids[ROW] - set.union(*(ids[:ROW] + ids[ROW + 1 :]))
    words = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(file)]
    return [*words, *RECIPE.flags(), "--save-interval", "1"], token


LAYOUTS = {
    "one": ([], 1),
    "mbs2": (["--micro-batch-size", "2"], 1),
    "dp2": ([], 2),
    "cp2": (["--context-parallel-size", "2"], 2),
    "fsdp2": (["--use-torch-fsdp2"], 2),
    "tp2-sp": (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    "pp2-mbs2": (["--pipeline-model-parallel-size", "2", "--micro-batch-size", "2"], 2),
}


def run_with(fault, spoilt, folder, layout):
    words, token = spoilt
    flags, world = LAYOUTS[layout]
    steps = folder.with_name("steps")
    environment = {faults.TOKEN: str(token), faults.STEPS: str(steps)}
    run = finetune(folder, *words, *flags, world=world, environment=environment, inject=fault)
    taken = [int(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
    return run, taken


def stopped_at(run, taken):
    """The step of the fault, after what holds wherever it stops."""
    lines = run.console.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: step "))
    step = int(lines[first].split()[2].rstrip(":"))
    assert "Traceback" not in run.console
    assert sum(line.startswith("error") for line in lines) == 1
    assert all(status == 1 for status in run.statuses)
    assert [record["iteration"] for record in run.steps] == list(range(1, step))
    assert max(taken) == step - 1, "the optimizer stepped with it"
    tracker = run.folder / "checkpoints/latest_checkpointed_iteration.txt"
    assert step > 1, "too early to show that a checkpoint is kept"
    assert tracker.read_text() == str(step - 1), "a checkpoint was saved, or lost"
    assert f"--iterations-to-skip {step} " in lines[-1]
    return step, lines[first:]


@pytest.mark.parametrize(
    ("fault", "value"),
    [(faults.nan_loss, "nan"), pytest.param(faults.infinite_loss, "inf", marks=pytest.mark.slow)],
)
def test_the_row_is_named(spoilt, tmp_path, fault, value):
    run, taken = run_with(fault, spoilt, tmp_path / "out", "one")
    _, lines = stopped_at(run, taken)
    assert f"the loss is {value}" in lines[0]
    (named,) = [line for line in lines if line.startswith("  ")]
    assert f"rows.jsonl:{ROW + 1} (pack " in named


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_the_run_goes_on_without_that_batch(spoilt, tmp_path, layout):
    fault = faults.nan_loss
    step, _ = stopped_at(*run_with(fault, spoilt, tmp_path / "out", layout))
    flags, world = LAYOUTS[layout]
    environment = {faults.TOKEN: str(spoilt[1]), faults.STEPS: str(tmp_path / "steps")}
    again = ["--iterations-to-skip", str(step)]
    rest = finetune(
        tmp_path / "out",
        *(*spoilt[0], *flags, *again),
        world=world,
        environment=environment,
        inject=fault,
    ).ok()
    expected = [each for each in range(1, RECIPE.steps + 1) if each != step]
    assert [record["iteration"] for record in rest.steps] == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_on_every_layout(spoilt, tmp_path, layout):
    run, taken = run_with(faults.nan_loss, spoilt, tmp_path / "out", layout)
    _, lines = stopped_at(run, taken)
    (named,) = [line for line in lines if line.startswith("  ")]
    assert f"rows.jsonl:{ROW + 1} (pack " in named


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_a_gradient_without_a_bad_loss(spoilt, tmp_path, layout):
    run, taken = run_with(faults.nan_gradient, spoilt, tmp_path / "out", layout)
    _, lines = stopped_at(run, taken)
    assert "the gradient norm is nan, while all losses are finite" in lines[0]
    assert "one of packs" in lines[1]


@pytest.mark.slow
def test_a_save_in_the_background_is_waited_for(spoilt, tmp_path):
    """The row stands in step 4, and it takes two seconds to write the checkpoint of step 3."""
    words = [*spoilt[0], "--save-interval", "3", "--async-save"]
    fault = faults.nan_loss_while_saving
    run, taken = run_with(fault, (words, spoilt[1]), tmp_path / "out", "dp2")
    step, lines = stopped_at(run, taken)
    folder = run.folder / "checkpoints"
    assert (step, newest_whole(folder)) == (4, 3)
    assert f"the newest checkpoint is {folder}/iter_0000003" in lines[0]
    assert not list(folder.glob("*.saving"))


@pytest.mark.slow
def test_the_flag_switches_it_off(spoilt, tmp_path):
    words = [*spoilt[0], "--no-check-for-nan-in-loss-and-grad"]
    run, taken = run_with(faults.nan_loss, (words, spoilt[1]), tmp_path / "out", "one")
    run.ok()
    assert max(taken) == RECIPE.steps
