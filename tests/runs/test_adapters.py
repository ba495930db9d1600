"""The life of a run with low-rank factors, beside Megatron's layers and in models of transformers.

That its numbers are right is in `tests/numerics/test_adapters.py`.
"""

import contextlib
import importlib
import io
import json
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import faults, plain_lora
from tests.helpers.checkpoint import same_tensors
from tests.helpers.launch import finetune, run_rank, run_script, start_finetune
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import HF, SP, TP2
from tests.runs.resume import numbers

RECIPE = Recipe(steps=8, lr=2e-2)
LAYOUTS = {"megatron": (*TP2, *SP), "transformers": HF}
LEAKS = {"megatron": faults.leaky_attention, "transformers": faults.leaky_documents}
needs_peft = pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "valid.jsonl", make_rows(17, seed=1))


@pytest.fixture(
    scope="module",
    params=["megatron", pytest.param("transformers", marks=[needs_peft, pytest.mark.slow])],
)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def words(backend, hf_model, chat_data, valid):
    """The command line of a run that draws random numbers in its factors; on two processes."""
    return [
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--valid-data-files", str(valid), *RECIPE.flags(), *LAYOUTS[backend]),
        *("--lora-rank", "4", "--lora-dropout", "0.2"),
    ]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The run that is not interrupted."""
    return finetune(tmp_path_factory.mktemp("straight") / "out", *words, world=2).ok()


def same_end(run, straight):
    """Whether the numbers of every step and all of the last checkpoint are the same, bit for bit."""
    ends = [r.folder / f"checkpoints/iter_{RECIPE.steps:07d}" for r in (run, straight)]
    return numbers(run) == numbers(straight) and run_rank(same_tensors, *ends)


def test_killed_between_saves_it_goes_on_bit_for_bit(words, straight, tmp_path):
    flags = [*words, "--save-interval", "3"]
    running = start_finetune(tmp_path / "out", *flags, world=2, inject=faults.stay_at_step_7)
    running.wait_for_step(5)
    running.send(signal.SIGKILL)
    assert running.wait().statuses == [-signal.SIGKILL] * 2
    run = finetune(tmp_path / "out", *flags, world=2).ok()
    assert "continuing after step 3" in run.console or "continuing after step 6" in run.console
    assert same_end(run, straight)


def test_sigterm_saves_and_the_same_command_goes_on(words, straight, tmp_path):
    long = [*words, "--train-iters", "4000", "--lr-decay-iters", str(RECIPE.steps)]
    running = start_finetune(tmp_path / "out", *long, world=2)
    running.wait_for_step(3)
    running.send(signal.SIGTERM)
    stopped = running.wait().ok()
    last = stopped.steps[-1]["iteration"]
    assert "SIGTERM" in stopped.console and 3 <= last < 4000
    run = finetune(tmp_path / "out", *long, "--exit-interval", str(last + 2), world=2).ok()
    assert f"continuing after step {last}" in run.console
    assert [step["iteration"] for step in run.steps] == list(range(1, last + 3))
    shared = min(RECIPE.steps, last + 2)
    assert numbers(run)[:shared] == numbers(straight)[:shared]


def test_a_leak_stops_it_before_its_first_step(backend, words, tmp_path):
    run = finetune(tmp_path / "out", *words, world=2, inject=LEAKS[backend])
    assert run.statuses == [1, 1] and "documents of a pack see each other" in run.console
    assert not any((run.folder / "checkpoints").iterdir())


def test_it_ends_early_and_keeps_its_best_checkpoint(words, tmp_path):
    early = ("--early-stop-metric", "loss", "--early-stop-patience", "1", "--keep-checkpoints", "1")
    flags = (*words, *early, "--lr", "3", "--eval-interval", "2", "--train-iters", "60")
    run = finetune(tmp_path / "out", *flags, world=2).ok()
    losses = {record["iteration"]: record["loss"] for record in run.evaluations}
    best = json.loads((run.folder / "best.json").read_text())["iteration"]
    assert losses[best] == min(losses.values()) and list(losses) == list(range(2, best + 3, 2))
    kept = {path.name for path in (run.folder / "checkpoints").glob("iter_*")}
    assert kept == {f"iter_{best:07d}", f"iter_{best + 2:07d}"}


def evaluate(scores, *words):
    """The answers of `evaluate.py`, called in this process."""
    sys.argv = ["evaluate.py", *words, "--max-new-tokens", "6", "--json", str(scores)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert importlib.import_module("scripts.evaluate").main() == 0
    return [row["answer"] for row in json.loads(scores.read_text())["answers"]]


def export(folder):
    """Call `export_hf.py` in this process."""
    sys.argv = ["export_hf.py", "--output-dir", str(folder), "--adapter"]
    assert importlib.import_module("scripts.export_hf").main() == 0


@needs_peft
def test_it_is_evaluated_and_answers_as_its_adapter_does_in_transformers(
    words, valid, straight, tmp_path
):
    """By `--eval-only` and `evaluate.py`, from a checkpoint that holds factors only."""
    folder = shutil.copytree(straight.folder, tmp_path / "out")
    finetune(folder, *words, "--eval-only", world=2).ok()
    (again,) = map(json.loads, (folder / "evaluations.jsonl").open())
    assert again["loss"] == pytest.approx(straight.evaluations[-1]["loss"], rel=1e-6)
    run_rank(export, folder)
    data = ("--data", str(valid), "--model-backend")
    run = run_rank(evaluate, tmp_path / "run.json", *data, "auto", "--output-dir", str(folder))
    plain = (*data, "transformers", "--hf-model", str(folder / "adapter"))
    assert run == run_rank(evaluate, tmp_path / "plain.json", *plain)


@needs_peft
def test_factors_that_peft_refuses_are_told_in_one_line(hf_model, chat_data, tmp_path):
    """Of fused experts it wants `gate_proj` and `up_proj` together."""
    words = ("--hf-model", str(hf_model("qwen3_moe")), "--finetune-data-files", str(chat_data.file))
    few = Recipe(steps=1).flags()
    run = finetune(tmp_path / "out", *words, *few, "--lora-rank", "4", "--lora-targets", "up_proj")
    done = run_script("scripts/export_hf.py", "--output-dir", str(run.ok().folder), "--adapter")
    assert done.returncode == 2 and "error: --adapter: peft does not read" in done.stderr
    assert "Traceback" not in done.stderr and not (run.folder / "adapter").exists()


@pytest.mark.slow
def test_merged_for_another_dtype_it_is_rounded_once(backend, words, tmp_path):
    """Frozen matrices are in bf16 while factors are in fp32: their sum in fp32 has no rounding at all."""
    flags = [word for word in words if word != "--fp32"] + ["--bf16", "--train-iters", "2"]
    run = finetune(tmp_path / "out", *flags, world=2).ok()
    words = ("--merge", "--dtype", "fp32", "--checkpoints", str(run.folder / "checkpoints"))
    done = run_script("scripts/export_hf.py", "--output-dir", str(run.folder), *words)
    assert done.returncode == 0, done.stderr
    name = "model.layers.0.mlp.down_proj"
    base, merged = (
        load_file(f"{folder}/model.safetensors")[f"{name}.weight"].float()
        for folder in (flags[1], run.folder / "hf")
    )
    a, b = (plain_lora.factors_in(run.folder)[f"{name}.lora_{part}.weight"] for part in "AB")
    change = 2 * b @ a  # alpha is twice the rank
    assert change.abs().max() > 1e-3
    assert torch.allclose(merged, base.bfloat16().float() + change, rtol=0, atol=1e-8)
