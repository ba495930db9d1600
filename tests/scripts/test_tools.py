"""Export, generate and evaluate, as commands on a run that was trained on two processes."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.launch import finetune, run_script
from tests.helpers.reference import Recipe

RECIPE = Recipe(steps=3)


def slow(*values):
    """A case that starts an interpreter of its own."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def run(hf_model, chat_data, tmp_path_factory):
    """A finished run at tensor parallel size 2."""
    folder = tmp_path_factory.mktemp("tools") / "out"
    flags = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    return finetune(
        folder, *flags, *RECIPE.flags(), "--tensor-model-parallel-size", "2", world=2
    ).ok()


@pytest.fixture(scope="module")
def exported(run):
    """The HuggingFace folder that the run is exported to, as if it had been trained on a GPU."""
    file = run.folder / "config.yaml"
    written = file.read_text()
    config = yaml.safe_load(written) | {
        "distributed_backend": "nccl",
        "transformer_impl": "transformer_engine",
        "attention_backend": "flash",
        "fp8": "hybrid",
        "tp_comm_overlap": True,
        "optimizer_cpu_offload": True,
        "async_save": True,
        "use_persistent_ckpt_worker": True,
        "wandb_project": "not here",
        "derived_flags": [],
    }
    file.write_text(yaml.safe_dump(config))
    done = run_script("scripts/export_hf.py", "--output-dir", str(run.folder))
    file.write_text(written)
    assert done.returncode == 0, done.stderr
    assert "logits agree within" in done.stdout
    return run.folder / "hf"


def test_export_reloads_and_continues_the_base_model(exported, hf_model):
    base = AutoModelForCausalLM.from_pretrained(hf_model("qwen3"), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.float32
    before, after = base.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template
    copied = {path.name for path in hf_model("qwen3").iterdir()} - {
        "config.json",
        "model.safetensors",
    }
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    for name in copied:
        assert (exported / name).read_bytes() == (hf_model("qwen3") / name).read_bytes(), name
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
    config = json.loads((exported / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.slow
def test_the_same_answer_both_ways(run, exported):
    prompt = ["--prompt", "What colour is the sky?", "--max-new-tokens", "6"]
    ours = run_script("scripts/generate.py", "--output-dir", str(run.folder), *prompt)
    theirs = run_script(
        *("scripts/generate.py", "--hf-model", str(exported), "--backend", "transformers", *prompt)
    )
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout == theirs.stdout
    raw = run_script("scripts/generate.py", "--output-dir", str(run.folder), *prompt, "--raw")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(prompt[1], return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(exported)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    answer = tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
    assert raw.stdout == f"{answer}\n" != ours.stdout


@pytest.mark.slow
def test_evaluate_counts_every_row(run, chat_data, tmp_path):
    out = tmp_path / "scores.json"
    done = run_script(
        *("scripts/evaluate.py", "--output-dir", str(run.folder), "--data", str(chat_data.file)),
        *("--max-new-tokens", "2", "--json", str(out), "--answer-pattern", "(.)"),
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())
    assert scores["rows"] == len(scores["answers"]) == len(chat_data.rows)
    assert "all" in done.stdout
    assert scores["truncated"] == sum(row["truncated"] for row in scores["answers"]) > 0
    assert (
        f"{scores['truncated']} of {scores['rows']} answers reached --max-new-tokens 2"
        in done.stdout
    )


@pytest.mark.slow
def test_a_copied_run_reads_its_own_checkpoints(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    done = run_script(
        *("scripts/export_hf.py", "--output-dir", str(copy), "--to", str(tmp_path / "hf")),
        *("--dtype", "bf16"),
    )
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    assert str(copy / "checkpoints") in done.stdout


@pytest.mark.slow
def test_a_damaged_run_is_exported_or_refused(run, tmp_path):
    """Megatron ends with status 0 where it cannot read the tracker file: nothing was exported."""
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    (copy / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("")
    words = ("scripts/export_hf.py", "--output-dir", str(copy), "--to", str(tmp_path / "hf"))
    done = run_script(*words)
    assert done.returncode == 0 and (tmp_path / "hf" / "config.json").is_file(), done.stderr
    config = copy / "config.yaml"
    config.write_text(config.read_text()[:2000])
    done = run_script(*words[:-1], str(tmp_path / "other"))
    assert done.returncode == 2 and f"error: {config}: is not whole" in done.stderr


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("scripts/export_hf.py", ["--output-dir", "nowhere"], "holds no run"),
        slow("scripts/generate.py", ["--prompt", "a"], "--output-dir"),
        slow(
            "scripts/generate.py", ["--hf-model", "x", "--prompt", "a", "--top-k", "-1"], "--top-k"
        ),
        slow("scripts/evaluate.py", ["--hf-model", "x", "--data", "no.jsonl"], "no such file"),
    ],
)
def test_wrong_flags_get_one_line(script, flags, expected):
    done = run_script(script, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_longer_training_goes_on(run, hf_model, chat_data, tmp_path):
    copy = tmp_path / "longer"
    shutil.copytree(run.folder, copy)
    steps = ["--train-iters", "5"]
    flags = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    again = finetune(copy, *flags, *RECIPE.flags(), *steps).ok()
    assert [step["iteration"] for step in again.steps] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("other", ["data", "weights", "--seq-length"])
def test_another_run_in_the_folder_is_refused(run, hf_model, chat_data, tmp_path, other):
    model, file, flags = hf_model("qwen3"), chat_data.file, RECIPE.flags()
    if other == "data":
        file = tmp_path / "other.jsonl"
        file.write_text("\n".join(chat_data.file.read_text().splitlines()[:-5]) + "\n")
    elif other == "weights":
        model = tmp_path / "other"
        shutil.copytree(hf_model("qwen3"), model)
        weights = load_file(model / "model.safetensors")
        save_file({k: v + 0.01 for k, v in weights.items()}, model / "model.safetensors")
    else:
        flags = [*flags, "--seq-length", "96"]
    done = finetune(
        run.folder, "--hf-model", str(model), "--finetune-data-files", str(file), *flags
    )
    assert done.status == 2
    advice = "choose another --output-dir" if other == "weights" else "--restart-data"
    assert other.removesuffix("-length") in done.console and advice in done.console


def test_config_names_what_was_derived(run):
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert "distributed_backend" in config["derived_flags"]
    assert "lr" not in config["derived_flags"]
