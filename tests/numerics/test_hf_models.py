"""Runs of models of `transformers`: stopped and continued, exported, evaluated, and what is refused.

That their numbers are right is in the equivalence matrix (`tests/numerics/equivalence.py`, "hf-").
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import faults, reference
from tests.helpers.launch import NO_PROCESS_GROUP, finetune, run_script, start_finetune
from tests.helpers.models import load_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

RECIPE = Recipe(steps=5)


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    """Tied weights, convolutions and states: its packs are rows."""
    model = str(hf_model("falcon_h1", tie_word_embeddings=True))
    return ["--hf-model", model, "--finetune-data-files", str(chat_data.file), *RECIPE.flags()]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    valid = write_rows(folder / "valid.jsonl", make_rows(17, seed=1))
    flags = ["--valid-data-files", str(valid), "--eval-interval", "5", "--save-hf"]
    return finetune(folder / "out", *words, *flags, world=2).ok()


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_on_other_processes(words, straight, tmp_path):
    finetune(tmp_path / "out", *words, "--exit-interval", "3", world=2).ok()
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    same = finetune(tmp_path / "out", *words, world=2).ok()
    assert same.losses == straight.losses
    assert [s["grad_norm"] for s in same.steps] == [s["grad_norm"] for s in straight.steps]
    other = finetune(tmp_path / "other", *words, world=1).ok()
    assert reference.relative(other.losses, straight.losses) < 1e-5
    assert "packing of FalconH1ForCausalLM: rows" in other.console


@pytest.mark.slow
def test_the_run_is_evaluated_and_exported(words, straight, tmp_path):
    """The same by the run, by what it exports, and by the export of its checkpoint."""
    exported = straight.folder / "hf"
    loss, tokens = reference.mean_loss(load_model(exported), make_rows(17, seed=1))
    assert straight.evaluations[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert straight.evaluations[-1]["tokens"] == tokens
    shutil.copytree(straight.folder, tmp_path / "out")
    valid = straight.folder.parent / "valid.jsonl"
    alone = ["--valid-data-files", str(valid), "--eval-only"]
    again = finetune(tmp_path / "out", *words, *alone, world=2, inject=faults.shards_only).ok()
    (found,) = map(json.loads, (again.folder / "evaluations.jsonl").open())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)

    folder = str(straight.folder)
    done = run_script("scripts/export_hf.py", "--output-dir", folder, "--to", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    saved, base = (load_file(path / "model.safetensors") for path in (exported, tmp_path / "hf"))
    assert saved.keys() == base.keys() and all(saved[n].equal(base[n]) for n in base)
    assert (exported / "tokenizer.json").is_file()
    prompt = ["--prompt", "What is two plus two?", "--max-new-tokens", "8"]
    ours = run_script("scripts/generate.py", "--output-dir", folder, *prompt)
    theirs = run_script("scripts/generate.py", "--hf-model", str(exported), *prompt)
    assert ours.returncode == 0 and ours.stdout == theirs.stdout, ours.stderr


@pytest.mark.slow
def test_random_weights_and_bf16(hf_model, chat_data, tmp_path):
    """fp32 shards that are computed in bf16; a seed gives the same model on any number of processes."""
    model = ["--hf-model", str(hf_model("gemma2")), "--finetune-data-files", str(chat_data.file)]
    flags = [*model, *Recipe(steps=2).flags(), "--random-weights", "--bf16"]
    first = finetune(tmp_path / "one", *flags, world=1).ok()
    second = finetune(tmp_path / "two", *flags, world=2).ok()
    assert reference.relative(second.losses, first.losses) < 1e-3
    assert "packing of Gemma2ForCausalLM: attention" in first.console
    done = run_script("scripts/export_hf.py", "--output-dir", str(first.folder))
    assert done.returncode == 0, done.stderr
    exported = AutoModelForCausalLM.from_pretrained(first.folder / "hf", dtype="auto")
    assert exported.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "flags", "told"),
    [
        ("gpt2", ["--seq-length", "1024"], "has learned 512 positions"),
        ("mamba", ["--tensor-model-parallel-size", "2"], "own class of transformers"),
    ],
)
def test_refused_before_a_process_group_starts(hf_model, chat_data, tmp_path, family, flags, told):
    model = ["--hf-model", str(hf_model(family)), "--finetune-data-files", str(chat_data.file)]
    environment = {"WORLD_SIZE": "2", NO_PROCESS_GROUP: "1"}
    words = [*model, *RECIPE.flags(), *flags]
    run = start_finetune(tmp_path / "out", *words, environment=environment).wait()
    assert run.status == 2 and told in run.console, run.console


@pytest.mark.slow
def test_a_checkpoint_of_the_other_backend_is_refused(hf_model, chat_data, tmp_path):
    model = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    words = [*model, *RECIPE.flags(), "--use-torch-fsdp2"]
    finetune(tmp_path / "out", *words, "--exit-interval", "2").ok()
    run = start_finetune(tmp_path / "out", *words, "--model-backend", "transformers").wait()
    assert run.status == 2 and "was written with --model-backend megatron" in run.console
