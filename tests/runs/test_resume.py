"""Exact resume: mid-epoch, across an epoch's edge, with dropout on, and from layout to layout.

`python tests/runs/resume.py --table` goes from every layout to every other.
"""

import os
import shutil

import pytest

from tests.helpers.checkpoint import same_tensors
from tests.helpers.launch import ROOT, finetune, run_rank
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import OVERLAP, STEP_BOUND
from tests.runs.resume import DROPOUT, LAYOUTS, TABLES, Layout, Resumes, difference, numbers

pytestmark = pytest.mark.slow
BY_NAME = {layout.name: layout for layout in TABLES["dense"]}


@pytest.fixture(scope="module")
def resumes(tmp_path_factory):
    return Resumes(tmp_path_factory.mktemp("resumes"))


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "pp2", "cp2"])
def test_stopped_anywhere_goes_on_bit_for_bit_with_dropout(resumes, tmp_path, layout):
    """Two epochs of 29 packs in batches of 4: one batch holds the end of one and the start of the other."""
    words = ["--train-iters", "0", "--num-epochs", "2", "--seq-length", "160", *DROPOUT]
    straight = resumes.run(tmp_path / "straight", BY_NAME[layout], *words)
    assert len(straight.steps) == 15
    # Mid-epoch; in the batch that holds the edge and just behind it; near the end.
    for last in (3, 7, 8, 14):
        run = resumes.run(tmp_path / "out", BY_NAME[layout], *words, "--exit-interval", str(last))
        assert [step["iteration"] for step in run.steps] == list(range(1, last + 1))
    run = resumes.run(tmp_path / "out", BY_NAME[layout], *words)
    assert numbers(run) == numbers(straight)
    ends = [r.folder / "checkpoints/iter_0000015" for r in (run, straight)]
    assert run_rank(same_tensors, *ends), "weights and optimizer too"


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if layout.name in ("vpp2", "ep2", "x2-cp2")],
    ids=lambda layout: layout.name,
)
def test_bit_for_bit_with_dropout(resumes, layout):
    """The same once, where the table has more: virtual stages, experts, FSDP2 with context parallelism."""
    assert resumes.compare(layout, layout) == (0.0, True)


@pytest.mark.parametrize(
    ("table", "before", "after", "flags"),
    [
        ("dense", "one", "one", ["--bf16"]),
        ("dense", "tp2", "pp2", []),
        ("experts", "ep2", "one", []),
    ],
)
def test_momentum_of_sgd_comes_back(resumes, table, before, after, flags):
    """It runs without the distributed optimizer: fp32 alone, fp32 copies of bf16 weights, two chained."""
    named = {layout.name: layout for layout in TABLES[table]}
    sgd = ["--optimizer", "sgd", "--lr", "0.05", *flags]
    found, holds = resumes.compare(named[before], named[after], *sgd)
    assert holds, found


def test_several_buckets(resumes):
    """Overlapped messages cut the optimizer's state into buckets, with padding between them."""
    flags = (*OVERLAP, "--ddp-bucket-size", "3000")
    found, holds = resumes.compare(Layout("buckets", flags, 2), BY_NAME["one"])
    assert holds, found


def test_dropout_is_on_and_random_states_matter(resumes, tmp_path):
    """Without the states of all ranks the test above would fail: this run has fresh ones."""
    dp2 = BY_NAME["dp2"]
    straight = resumes.straight(dp2, *DROPOUT)
    stopped = resumes.stopped(dp2, *DROPOUT)
    load = ["--load", str(stopped.folder / "checkpoints"), "--no-load-rng"]
    run = resumes.run(tmp_path / "out", dp2, *DROPOUT, *load)
    assert run.steps[0]["iteration"] == 4
    assert run.losses[0] != straight.losses[3]
    assert numbers(straight) != numbers(resumes.straight(dp2))


def test_from_layout_to_layout(resumes, tmp_path):
    """One run that changes its layout at every other step."""
    chain = ["tp2", "pp2", "dp2", "cp2", "mbs2", "tp2-sp", "one"]
    for number, name in enumerate(chain, 1):
        flags = ["--exit-interval", str(number)] if name != "one" else []
        run = resumes.run(tmp_path / "out", BY_NAME[name], *flags)
    assert [step["iteration"] for step in run.steps] == list(range(1, 9))
    assert difference(run, resumes.straight(BY_NAME["one"])) < STEP_BOUND


def test_other_data_in_a_copied_checkpoint(resumes, tmp_path):
    """`--load` of a run in other data: refused, or begun anew where that is asked for."""
    stopped = resumes.stopped(Layout("one"))
    data = write_rows(tmp_path / "other.jsonl", make_rows(60, seed=1))
    words = ["--finetune-data-files", str(data), "--load", str(stopped.folder / "checkpoints")]
    one = ["--hf-model", str(resumes.folder / "dense"), *resumes.words]
    refused = finetune(tmp_path / "refused", *one, *words)
    assert refused.statuses == [2] and "the training data differs" in refused.console
    assert "--restart-data" in refused.console
    words += ["--restart-data", "--train-iters", "0", "--num-epochs", "1"]
    run = finetune(tmp_path / "out", *one, *words).ok()
    assert run.steps[0]["iteration"] == 4, "the step count goes on"
    fresh = [*words[:2], "--train-iters", "0", "--num-epochs", "1"]
    epoch = finetune(tmp_path / "epoch", *one, *fresh).ok()
    tokens = [step["trained_tokens"] for step in run.steps]
    assert tokens == [step["trained_tokens"] for step in epoch.steps], (
        "the whole data, from its start"
    )
    # Stopped in between and given again, the flag does not restart it once more.
    parts = finetune(tmp_path / "parts", *one, *words, "--exit-interval", "6").ok()
    assert [step["iteration"] for step in parts.steps] == [4, 5, 6]
    parts = finetune(tmp_path / "parts", *one, *words).ok()
    assert numbers(parts) == numbers(run)


def test_the_same_documents_by_another_path(resumes, tmp_path):
    """A moved copy, relative, in a cache of its own; with other workers and a moved base model."""
    straight, stopped = resumes.straight(BY_NAME["one"]), resumes.stopped(BY_NAME["one"])
    shutil.copytree(stopped.folder, tmp_path / "out")
    shutil.copytree(resumes.folder / "dense", tmp_path / "model")
    (tmp_path / "moved").mkdir()
    shutil.copy(resumes.folder / "train.jsonl", tmp_path / "moved/other.jsonl")
    data = os.path.relpath(tmp_path / "moved", ROOT)
    words = ["--finetune-data-files", data, "--data-workers", "1", "--data-cache-dir"]
    words += [str(tmp_path / "cache"), "--hf-model", str(tmp_path / "model/../model")]
    run = finetune(tmp_path / "out", *resumes.words, *words).ok()
    assert numbers(run) == numbers(straight)
    (note,) = [line for line in run.console.splitlines() if line.startswith("note:")]
    assert note.endswith(f"train.jsonl, now {data}/other.jsonl)")
