"""`finetune.py` from the command line: outputs, resuming, signals, evaluation, and what it refuses.

That its numbers are right on every layout is in `tests/numerics/test_layouts.py`.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import faults, models, reference
from tests.helpers.launch import (
    NO_PROCESS_GROUP,
    ROOT,
    Finished,
    finetune,
    run_script,
    start_finetune,
)
from tests.helpers.models import edit_json, load_model, make_tokenizer
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, tokens_and_mask, write_rows

# What a step's numbers are, apart from how long it took.
NUMBERS = (
    *("iteration", "consumed_samples", "lm_loss", "grad_norm", "lr"),
    *("trained_tokens", "token_accuracy"),
)
RECIPE = Recipe(steps=8)


@pytest.fixture(scope="module")
def words(hf_model, chat_data):
    """The command line of a run of 8 steps."""
    model = str(hf_model("qwen3"))
    return ["--hf-model", model, "--finetune-data-files", str(chat_data.file), *RECIPE.flags()]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The run that is not interrupted."""
    return finetune(tmp_path_factory.mktemp("straight") / "out", *words).ok()


def numbers(run: Finished):
    return [tuple(step[name] for name in NUMBERS) for step in run.steps]


# --- as a user starts it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_torchrun(words, tmp_path_factory):
    """Three steps on two processes, with `torchrun` and everything in new interpreters."""
    folder = tmp_path_factory.mktemp("torchrun") / "out"
    flags = ["--tensor-model-parallel-size", "2", "--exit-interval", "3", "--no-save-optim"]
    done = run_script("finetune.py", *words, *flags, "--output-dir", str(folder), world=2)
    return done, Finished(done.returncode, [done.returncode], done.stderr, folder)


def test_torchrun_writes_everything_it_promises(with_torchrun, straight):
    done, run = with_torchrun
    assert done.returncode == 0, done.stderr
    found = {path.name for path in run.folder.iterdir()}
    expected = {"checkpoints", "tensorboard", "metrics.jsonl", "config.yaml", "train.log"}
    assert found >= expected | {"report.html", "starts.jsonl", "data.txt"}
    assert (run.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"
    assert "<svg" in (run.folder / "report.html").read_text()
    assert any((run.folder / "tensorboard").iterdir())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert reference.relative(run.losses, straight.losses[:3]) < 1e-5
    fields = {"tokens_per_s", "real_tokens_per_s", "data_wait_fraction", *NUMBERS}
    assert all(fields <= step.keys() for step in run.steps)
    assert 0 < run.steps[0]["real_tokens_per_s"] <= run.steps[0]["tokens_per_s"]


def test_config_yaml_runs_the_same_again(with_torchrun, straight, tmp_path):
    _, run = with_torchrun
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["transformer_impl"] == "local" and config["distributed_backend"] == "gloo"
    # The flag on the command line wins: one process this time.
    again = finetune(
        tmp_path / "again",
        *("--config", str(run.folder / "config.yaml"), "--tensor-model-parallel-size", "1"),
    ).ok()
    assert numbers(again) == numbers(straight)[:3]


def test_the_logged_learning_rate_is_the_one_of_the_step(straight):
    """Not the next one's, which Megatron logs; in TensorBoard and `train.log` too."""
    used = [RECIPE.learning_rate(steps_done) for steps_done in range(RECIPE.steps)]
    assert [step["lr"] for step in straight.steps] == pytest.approx(used)
    events = EventAccumulator(str(straight.folder / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("learning-rate")]
    assert scalars == [(n, pytest.approx(rate)) for n, rate in enumerate(used, 1)]
    assert f"learning rate: {used[0]:.6E}" in (straight.folder / "train.log").read_text()


@pytest.mark.slow
def test_warm_up_begins_at_zero(words, hf_model, tmp_path):
    """As in Megatron and `transformers`: the first step leaves the weights as they are."""
    schedule = ["--train-iters", "1", "--lr-warmup-iters", "2", "--lr-decay-iters", "4"]
    run = finetune(tmp_path / "out", *words, *schedule, "--save-hf").ok()
    assert [step["lr"] for step in run.steps] == [0.0] and run.steps[0]["grad_norm"] > 0
    before, after = (
        load_file(f / "model.safetensors") for f in (hf_model("qwen3"), tmp_path / "out/hf")
    )
    assert all(after[name].equal(value) for name, value in before.items())
    begun = finetune(tmp_path / "other", *words, *schedule, "--lr-warmup-init", "1e-4").ok()
    assert [step["lr"] for step in begun.steps] == [1e-4]


@pytest.mark.slow
def test_save_hf_exports_the_checkpoint_of_the_last_step(words, tmp_path):
    """Not the newest one in the run's folder, where another run has saved."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    finetune(out, *words, "--exit-interval", "1").ok()
    assert (out / "checkpoints" / "iter_0000001").is_dir()
    run = finetune(
        out,
        *words,
        "--train-iters",
        "2",
        "--lr-decay-iters",
        "2",
        "--save",
        str(elsewhere),
        "--save-hf",
    ).ok()
    assert f"{elsewhere}/iter_0000002 -> {out}/hf: reloaded" in run.console


# --- resuming ------------------------------------------------------------------------------------


def test_same_command_again_continues_bit_for_bit(words, straight, tmp_path):
    """Reference's fault: resuming tokenises from the start and can repeat data."""
    flags = [*words, "--exit-interval", "3"]
    for steps in (3, 6, 8):
        run = finetune(tmp_path / "out", *flags).ok()
        assert numbers(run) == numbers(straight)[:steps]
        assert "error" not in run.console
    # Once more after the end: nothing is lost, and nothing is trained.
    metrics = (tmp_path / "out/metrics.jsonl").read_text()
    checkpoints = sorted((tmp_path / "out/checkpoints").iterdir())
    over = finetune(tmp_path / "out", *flags).ok()
    assert (tmp_path / "out/metrics.jsonl").read_text() == metrics
    assert sorted((tmp_path / "out/checkpoints").iterdir()) == checkpoints
    assert numbers(over) == numbers(straight)


@pytest.mark.slow
def test_continues_in_another_layout(words, straight, tmp_path):
    flags = [*words, "--exit-interval", "3"]
    finetune(tmp_path / "out", *flags, "--tensor-model-parallel-size", "2", world=2).ok()
    finetune(tmp_path / "out", *flags, "--pipeline-model-parallel-size", "2", world=2).ok()
    run = finetune(tmp_path / "out", *flags, world=2).ok()
    assert [step["iteration"] for step in run.steps] == list(range(1, 9))
    assert reference.relative(run.losses, straight.losses) < 1e-5
    found, expected = ([s["grad_norm"] for s in r.steps] for r in (run, straight))
    assert reference.relative(found, expected) < 1e-5


def test_importing_it_loads_no_library_that_comes_later():
    """What only preparing data, the model's folder or the end of a run needs is imported there."""
    done = run_script("-c", "import sys, finetune; print(*sys.modules)").stdout.split()
    loaded = {name.partition(".")[0] for name in done}
    later = {
        "transformers",
        "huggingface_hub",
        "safetensors.torch",
        "datasets",
        "pyarrow",
        "pandas",
    }
    # Megatron itself imports wandb where it is installed.
    later |= {"mlflow", "modelopt", "torch._dynamo", "torch._inductor"}
    assert "megatron" in loaded and not later & (loaded | set(done))


@pytest.mark.slow
def test_ctrl_c_during_the_imports_shows_no_traceback():
    words = [sys.executable, "-X", "importtime", "finetune.py", "--help"]
    running = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    lines = iter(running.stderr.readline, "")
    assert any(line.rpartition("|")[2].strip().startswith("torch") for line in lines)
    running.send_signal(signal.SIGINT)
    rest = running.stderr.read()
    assert running.wait(60) == -signal.SIGINT
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_a_killed_run_loses_only_what_came_after_the_checkpoint(words, straight, tmp_path):
    flags = [*words, "--save-interval", "2"]
    running = start_finetune(tmp_path / "out", *flags, inject=faults.stay_at_step_7)
    running.wait_for_step(5)
    running.send(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    with (tmp_path / "out/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lm_lo')  # cut off in the middle of a line
    run = finetune(tmp_path / "out", *words, "--save-interval", "2").ok()
    assert numbers(run) == numbers(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_saves_and_the_same_command_continues(words, straight, tmp_path, number):
    long = [*words, "--train-iters", "4000", "--lr-decay-iters", "8"]
    running = start_finetune(tmp_path / "out", *long)
    running.wait_for_step(2)
    for _ in range(2):  # schedulers and launchers both send it
        running.send(number)
    stopped = running.wait()
    assert stopped.status == 0, stopped.console
    assert number.name in stopped.console and "Traceback" not in stopped.console
    last = stopped.steps[-1]["iteration"]
    assert 2 <= last < 4000
    tracker = tmp_path / "out/checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(last)
    assert "continue" in stopped.console, "says how to go on"
    run = finetune(tmp_path / "out", *long, "--exit-interval", str(last + 2)).ok()
    assert f"continuing after step {last}" in run.console
    assert [step["iteration"] for step in run.steps] == list(range(1, last + 3))
    shared = min(8, last + 2)
    assert numbers(run)[:shared] == numbers(straight)[:shared]


def test_a_record_is_on_all_steps_since_the_last_one(words, straight, held_out, tmp_path):
    """A save and an evaluation in between cut it short, so that no step is lost with them."""
    flags = ["--log-interval", "3", "--save-interval", "5", "--no-save-optim"]
    valid = ["--valid-data-files", str(held_out[0][1]), "--eval-interval", "4"]
    run = finetune(tmp_path / "out", *words, *flags, *valid).ok()
    ends = [3, 4, 5, 6, 8]
    assert [step["iteration"] for step in run.steps] == ends
    for step, begin in zip(run.steps, [0, *ends], strict=False):
        part = straight.steps[begin : step["iteration"]]
        tokens = sum(each["trained_tokens"] for each in part)
        loss = sum(each["lm_loss"] * each["trained_tokens"] for each in part) / tokens
        assert step["lm_loss"] == pytest.approx(loss, rel=1e-12)
        assert step["trained_tokens"] == tokens
        assert step["grad_norm"] == part[-1]["grad_norm"]
    assert run.steps[-1]["total_trained_tokens"] == straight.steps[-1]["total_trained_tokens"]


# --- evaluation and epochs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Rows that are not in the training data: 17 for validation, 9 to test."""
    folder = tmp_path_factory.mktemp("held_out")
    valid, test = make_rows(17, seed=1), make_rows(9, seed=2)
    return (
        (valid, write_rows(folder / "valid.jsonl", valid)),
        (test, write_rows(folder / "test.jsonl", test)),
    )


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        ([], 1),
        ([], 2),
        (["--global-batch-size", "6", "--micro-batch-size", "3"], 1),
        (["--pipeline-model-parallel-size", "2", "--micro-batch-size", "2"], 2),
        (["--context-parallel-size", "2", "--micro-batch-size", "2"], 2),
    ],
    ids=["one", "dp2", "batch6-mbs3", "pp2-mbs2", "cp2-mbs2"],
)
def test_evaluation_is_token_weighted_over_the_whole_split(
    words, hf_model, held_out, tmp_path, flags, world
):
    """Faults of the reference: evaluation is a mean of means, on the training data."""
    splits = ["--valid-data-files", str(held_out[0][1]), "--test-data-files", str(held_out[1][1])]
    # With learning rate 0 the model stays what HuggingFace loaded.
    run = finetune(
        tmp_path / "out",
        *(*words, *splits, "--lr", "0", "--train-iters", "4", "--eval-interval", "2", *flags),
        "--no-save-optim",
        world=world,
    ).ok()
    model = load_model(hf_model("qwen3"))
    for split, (rows, _), steps in (
        ("valid", held_out[0], {2, 4}),
        ("test", held_out[1], {4}),
    ):
        loss, tokens, right = reference.evaluate(model, rows)
        records = [record for record in run.evaluations if record["split"] == split]
        assert {record["iteration"] for record in records} >= steps
        for record in records:
            assert record["loss"] == pytest.approx(loss, rel=1e-6)
            assert record["tokens"] == tokens
            assert abs(record["token_accuracy"] * tokens - right.tokens) < right.close + 1e-6
    saves = [record for record in run.records if "save_seconds" in record]
    assert [record["iteration"] for record in saves] == [4]
    clocks = ["tokens-per-s", "data-wait-fraction", "step-seconds"]
    for names, records in (
        (["token-accuracy", *clocks], run.steps),
        (["perplexity valid", "token-accuracy valid"], run.evaluations[:2]),
        (["save-seconds"], saves),
    ):
        for name in names:
            key = name.partition(" ")[0].replace("-", "_")
            # Another rank may write TensorBoard's, by its own clock.
            own = world == 1 or "seconds" not in key and name not in clocks
            expected = [
                (record["iteration"], pytest.approx(record[key], rel=1e-6) if own else ANY)
                for record in records
            ]
            assert written(run, name) == expected


def written(run: Finished, name: str):
    """(step, value) of a curve in TensorBoard."""
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_load_that_ends_without_a_word_is_no_success(words, tmp_path):
    run = finetune(tmp_path / "out", *words, inject=faults.load_that_exits)
    assert run.status == 1 and "to continue" not in run.console


def test_eval_iters_reads_the_same_packs_every_time(words, held_out, tmp_path):
    flags = ["--lr", "0", "--eval-interval", "2", "--eval-iters", "1", "--train-iters", "6"]
    valid = ["--valid-data-files", str(held_out[0][1]), "--no-save-optim"]
    run = finetune(tmp_path / "out", *words, *valid, *flags).ok()
    found = {(record["loss"], record["tokens"]) for record in run.evaluations}
    assert len(run.evaluations) == 3 and len(found) == 1
    assert (
        finetune(tmp_path / "none", *words, *valid, *flags, "--eval-iters", "0").ok().evaluations
        == []
    )


def test_nothing_is_evaluated_where_no_split_is_given(straight):
    """Reference's fault: validation and test are the training data."""
    assert straight.evaluations == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_num_epochs_trains_every_token_that_often(hf_model, chat_data, tmp_path, epochs):
    """Reference's fault: the tail of each pack, 13-19 % of all tokens, is thrown away."""
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--num-epochs", str(epochs), "--global-batch-size", "4", "--seq-length", "192"),
        *("--micro-batch-size", "2", "--no-save-optim"),
    ).ok()
    tokenizer = make_tokenizer()
    once = sum(int(tokens_and_mask(row, tokenizer)[1].sum()) for row in chat_data.rows)
    assert sum(step["trained_tokens"] for step in run.steps) == epochs * once
    assert run.steps[-1]["trained_tokens"] > 0, "no step of filler packs alone"
    assert [step["iteration"] for step in run.steps] == list(range(1, len(run.steps) + 1))


# --- what it refuses -----------------------------------------------------------------------------


@pytest.fixture
def folder(hf_model, tmp_path):
    """A copy of a model folder, to be spoilt."""
    return Path(shutil.copytree(hf_model("qwen3"), tmp_path / "model"))


def refused(tmp_path: Path, *flags: str, world: int = 1) -> str:
    """The one line that a refused run prints; it is one of `world` processes without the others."""
    environment = {"WORLD_SIZE": str(world), NO_PROCESS_GROUP: "1"}
    run = start_finetune(tmp_path / "out", *flags, environment=environment).wait()
    assert run.status == 2, (run.status, run.console)
    lines = run.console.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines, run.console
    assert len(lines) == 1, run.console
    return lines[0]


BAD_DATA = {
    "missing file": (None, ["--finetune-data-files", "train.jsonl"]),
    "empty file": ("", ["train.jsonl", "empty"]),
    "bad JSON": ('{"messages": []}\n{"mess\n', ["train.jsonl:2", "JSON"]),
    "no assistant turn": (
        json.dumps(make_rows(1)[0])
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "Why?"}]}),
        ["train.jsonl:2", "assistant"],
    ),
    "unknown role": (
        json.dumps({"messages": [{"role": "oracle", "content": "Why?"}]}),
        ["train.jsonl:1", "oracle"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused(hf_model, tmp_path, case):
    content, expected = BAD_DATA[case]
    if case == "bad JSON" and content is not None:
        content = json.dumps(make_rows(1)[0]) + content[content.index("\n") :]
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    words = ["--finetune-data-files", str(file), "--train-iters", "1"]
    message = refused(tmp_path, "--hf-model", str(hf_model("qwen3")), *words)
    for text in expected:
        assert text in message


def test_tokenizer_without_chat_template_is_refused(folder, chat_data, tmp_path):
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    words = ["--finetune-data-files", str(chat_data.file), "--train-iters", "1"]
    assert "chat template" in refused(tmp_path, "--hf-model", str(folder), *words)


def test_architecture_that_cannot_be_loaded_is_refused(folder, chat_data, tmp_path):
    edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    words = ["--finetune-data-files", str(chat_data.file), "--train-iters", "1"]
    megatron = ("--model-backend", "megatron")
    message = refused(tmp_path, "--hf-model", str(folder), *megatron, *words)
    assert "GPT2LMHeadModel" in message
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe"):
        assert f"{name}ForCausalLM" in message


def test_vocabulary_smaller_than_the_ids_is_refused(hf_model, chat_data, tmp_path):
    tokenizer = make_tokenizer()
    bigger = type(tokenizer).from_pretrained(hf_model("qwen3"))
    bigger.add_tokens(["Question"])
    bigger.save_pretrained(tmp_path / "tokenizer")
    row = {
        "messages": [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "a"}]
    }
    file = write_rows(tmp_path / "more.jsonl", [row])
    message = refused(
        tmp_path,
        *("--hf-model", str(hf_model("qwen3")), "--hf-tokenizer", str(tmp_path / "tokenizer")),
        *("--finetune-data-files", str(file), "--train-iters", "1"),
    )
    assert str(models.VOCABULARY) in message and "--hf-tokenizer" in message


@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        (["--tensor-model-parallel-size", "3"], 3, ["heads", "1, 2"]),
        (["--tensor-model-parallel-size", "4"], 4, ["key/value heads", "1, 2"]),
        (["--pipeline-model-parallel-size", "3"], 3, ["2 layers", "1, 2"]),
        (["--tensor-model-parallel-size", "2"], 3, ["3 processes", "multiple of 2"]),
        (["--global-batch-size", "5", "--micro-batch-size", "2"], 1, ["5", "nearest", "4"]),
        (
            ["--global-batch-size", "4"],
            3,
            ["--global-batch-size 4", "3 data parallel", "--global-batch-size 3"],
        ),
    ],
    ids=["heads", "kv-heads", "layers", "world", "micro-batch", "dp-batch"],
)
def test_layout_that_cannot_work_is_refused(words, tmp_path, flags, world, expected):
    message = refused(tmp_path, *words, *flags, world=world)
    for text in expected:
        assert text in message


def test_another_models_checkpoint_in_the_output_folder_is_refused(
    straight, hf_model, chat_data, tmp_path
):
    metrics = (straight.folder / "metrics.jsonl").read_bytes()
    shutil.copytree(straight.folder, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    words = ["--finetune-data-files", str(chat_data.file), *RECIPE.flags()]
    message = refused(tmp_path, "--hf-model", str(hf_model("llama")), *words)
    assert "another model" in message and "--output-dir" in message
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == metrics


def spoil(folder: Path, how: str) -> list[str]:
    """Make a model folder's weights unusable; returns what the message must name."""
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
        return ["--hf-model", "safetensors"]
    if how == "pickled weights":
        weights.rename(folder / "pytorch_model.bin")
        return ["--hf-model", "safetensors", "pytorch_model.bin"]
    if how == "missing shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return ["--hf-model", "model-00001-of-00002.safetensors"]
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights)
    return ["--hf-model", "model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "pickled weights",
        "missing shard",
        "missing tensor",
    ],
)
def test_folder_without_all_weights_is_refused(folder, chat_data, tmp_path, how):
    expected = spoil(folder, how)
    words = ["--finetune-data-files", str(chat_data.file), "--train-iters", "1"]
    message = refused(tmp_path, "--hf-model", str(folder), *words, world=2)
    for text in expected:
        assert text in message


@pytest.mark.slow
def test_the_first_rank_tells_an_error_and_the_others_unless_a_launcher_ends_them(words, tmp_path):
    file = str(tmp_path / "nowhere.jsonl")
    running = start_finetune(tmp_path / "out", *words, "--finetune-data-files", file, world=2)
    run = running.wait()
    assert run.statuses == [2, 2]
    (line,) = run.console.splitlines()
    assert line.startswith("error: ") and "nowhere.jsonl" in line
    # It may be the only one that has something to tell, or the first to come so far.
    other = line.replace("error: ", "error on rank 1: ")
    assert running.consoles[1].read_text().splitlines() == [other]
