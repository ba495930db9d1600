"""`finetune.py --use-torch-fsdp2`: resuming, signals, evaluation, the tools, and what it refuses.

That its numbers are right is in the equivalence matrix (`tests/numerics/equivalence.py`).
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import reference
from tests.helpers.launch import NO_PROCESS_GROUP, Finished, finetune, run_script, start_finetune
from tests.helpers.models import load_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows

NUMBERS = ("iteration", "consumed_samples", "lm_loss", "grad_norm", "lr", "trained_tokens")
RECIPE = Recipe(steps=6)


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    model = str(hf_model("qwen3"))
    data = ["--hf-model", model, "--finetune-data-files", str(chat_data.file)]
    return [*data, *RECIPE.flags(), "--use-torch-fsdp2"]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The run that is not interrupted, evaluated and exported at its end."""
    folder = tmp_path_factory.mktemp("straight")
    valid = write_rows(folder / "valid.jsonl", make_rows(17, seed=1))
    flags = ["--valid-data-files", str(valid), "--eval-interval", "3", "--save-hf"]
    return finetune(folder / "out", *words, *flags, world=2).ok()


def numbers(run: Finished):
    return [tuple(step[name] for name in NUMBERS) for step in run.steps]


def norms(run: Finished):
    return [step["grad_norm"] for step in run.steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer", "sgd", "--lr", "0.05"],
        ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"],
        ["--bf16"],
    ],
    ids=["adam", "sgd", "dropout", "bf16"],
)
def test_same_command_again_continues_bit_for_bit(words, tmp_path, flags):
    expected = numbers(finetune(tmp_path / "straight", *words, *flags, world=2).ok())
    for steps in (2, 4, 6):
        stop = ["--exit-interval", "2"]
        run = finetune(tmp_path / "out", *words, *flags, *stop, world=2).ok()
        assert numbers(run) == expected[:steps]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_continues_on_another_number_of_processes(hf_model, chat_data, tmp_path, family):
    model = ["--hf-model", str(hf_model(family)), "--finetune-data-files", str(chat_data.file)]
    flags = [*model, *RECIPE.flags(), "--use-torch-fsdp2"]
    expected = finetune(tmp_path / "straight", *flags, world=1).ok()
    for world in (2, 1, 4):
        run = finetune(tmp_path / "out", *flags, "--exit-interval", "2", world=world).ok()
    assert [step["iteration"] for step in run.steps] == list(range(1, 7))
    assert reference.relative(run.losses, expected.losses) < 1e-5
    assert reference.relative(norms(run), norms(expected)) < 1e-5


@pytest.mark.slow
def test_signal_saves_and_the_same_command_continues(words, straight, tmp_path):
    long = [*words, "--train-iters", "4000", "--lr-decay-iters", "6"]
    running = start_finetune(tmp_path / "out", *long, world=2)
    running.wait_for_step(2)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.status == 0 and "SIGINT" in stopped.console, stopped.console
    last = stopped.steps[-1]["iteration"]
    run = finetune(tmp_path / "out", *long, "--exit-interval", str(last + 2), world=2).ok()
    assert f"continuing after step {last}" in run.console
    shared = min(6, last + 2)
    assert numbers(run)[:shared] == numbers(straight)[:shared]


@pytest.mark.slow
def test_finetune_starts_with_a_new_optimizer(words, straight, tmp_path):
    """Upstream reads the old optimizer's state in place even where a new one is wanted."""
    load = ["--load", str(straight.folder / "checkpoints"), "--finetune"]
    run = finetune(tmp_path / "out", *words, *load, "--no-save-optim", world=2).ok()
    model = ["--hf-model", str(straight.folder / "hf"), *words[2:]]
    expected = finetune(tmp_path / "expected", *model, "--no-save-optim", world=2).ok()
    assert numbers(run) == numbers(expected)


@pytest.mark.slow
def test_evaluation_is_token_weighted_over_the_whole_split(straight):
    rows = make_rows(17, seed=1)
    loss, tokens = reference.mean_loss(load_model(straight.folder / "hf"), rows)
    assert [record["iteration"] for record in straight.evaluations] == [3, 6]
    assert straight.evaluations[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert straight.evaluations[-1]["tokens"] == tokens


@pytest.mark.slow
def test_skip_train_evaluates_a_checkpoint_without_an_optimizer(words, straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "out")
    valid = straight.folder.parent / "valid.jsonl"
    flags = ["--valid-data-files", str(valid), "--skip-train"]
    run = finetune(tmp_path / "out", *words, *flags, world=2).ok()
    (found,) = map(json.loads, (run.folder / "evaluations.jsonl").open())
    assert found["loss"] == pytest.approx(straight.evaluations[-1]["loss"], rel=1e-6)


@pytest.mark.slow
def test_tools_read_the_checkpoint(straight, tmp_path):
    folder = str(straight.folder)
    done = run_script("scripts/export_hf.py", "--output-dir", folder, "--to", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    found, saved = (
        load_file(Path(where) / "model.safetensors")
        for where in (tmp_path / "hf", straight.folder / "hf")
    )
    assert all(found[name].equal(saved[name]) for name in saved)
    prompt = ["--prompt", "What is two plus two?", "--max-new-tokens", "8"]
    ours = run_script("scripts/generate.py", "--output-dir", folder, *prompt)
    plain = ["--hf-model", str(tmp_path / "hf"), "--backend", "transformers"]
    theirs = run_script("scripts/generate.py", *plain, *prompt)
    assert ours.returncode == 0 and ours.stdout == theirs.stdout, ours.stderr
    data = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    again = run_script("scripts/evaluate.py", "--output-dir", folder, "--data", str(data))
    assert again.returncode == 0 and "iter_0000006" in again.stdout, again.stderr


def refused(tmp_path: Path, *flags: str, world: int = 2) -> str:
    environment = {"WORLD_SIZE": str(world), NO_PROCESS_GROUP: "1"}
    run = start_finetune(tmp_path, *flags, environment=environment).wait()
    assert run.status == 2, (run.status, run.console)
    (line,) = run.console.splitlines()
    return line


@pytest.mark.slow
def test_a_checkpoint_of_the_other_format_is_refused(words, straight, tmp_path):
    without = [word for word in words if word != "--use-torch-fsdp2"]
    shutil.copytree(straight.folder, tmp_path / "fsdp2")
    message = refused(tmp_path / "fsdp2", *without)
    assert "written with --use-torch-fsdp2" in message and "export_hf.py" in message
    finetune(tmp_path / "dp", *without, "--exit-interval", "2", world=2).ok()
    message = refused(tmp_path / "dp", *words)
    assert "written without --use-torch-fsdp2" in message and "leave it out" in message
    for run, last, name in (("fsdp2", 6, "torch_dcp"), ("dp", 2, "torch_dist")):
        manifest = tmp_path / run / f"checkpoints/iter_{last:07d}/manifest.json"
        assert json.loads(manifest.read_text())["origin"]["ckpt_format"] == name


def test_config_file_asks_for_fsdp2(words, tmp_path):
    """Derived flags follow from the file as from the command line."""
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"use_torch_fsdp2": True}))
    message = refused(tmp_path / "out", *words[:-1], "--config", str(config), "--fp16")
    assert "--use-torch-fsdp2 with --fp16" in message


def test_flags_of_other_checkpoints_are_refused(words, tmp_path):
    for flag in ("--async-save", "--verify-integrity"):
        assert f"{flag}: not with --use-torch-fsdp2" in refused(tmp_path / "out", *words, flag)
