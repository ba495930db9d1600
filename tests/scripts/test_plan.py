"""`scripts/plan.py` on the shape of Qwen2.5 7B (its published config.json): no weights, no devices."""

import json
import shlex
import sys

import pytest

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from post_training.layout.planner import Machines, ranked
from scripts import plan

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))

    def call(*words, model="config.json"):
        argv = ["plan.py", *words, "--hf-model", str(tmp_path / model)]
        monkeypatch.setattr(sys, "argv", argv)
        status = plan.main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def rows(out):
    lines = out.split("\n\n")[0].splitlines()[1:]
    return [line.split() for line in lines]


def test_the_first_of_the_table_fits_and_is_the_fastest(run):
    status, out, _ = run("--gpus", "8xh100", "--seq-length", "32768", "--top", "99")
    assert status == 0
    found = rows(out)
    fitting = [row for row in found if "fit" not in row]
    speeds = [int(row[-1].replace(",", "")) for row in fitting]
    assert speeds == sorted(speeds, reverse=True) and 1 < len(fitting) < len(found)
    assert all(float(row[7]) <= 79.1 for row in fitting)
    assert all(float(row[7]) > 79.1 for row in found if "fit" in row)
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:4] == ["python", "scripts/launch.py", "--nproc-per-node", "8"]
    flags = command[command.index("finetune.py") + 1 :]
    place = flags.index("--hf-model")
    status, out, err = run(
        "--gpus", "8xh100", "--check", *flags[:place], *flags[place + 2 :], model=""
    )
    assert status == 0 and f"fits: {found[0][7]} of 79.1 GiB" in out, err


def test_check_refuses_what_does_not_fit_and_names_what_does(run):
    status, out, err = run("--gpus", "8x80gib", "--check", "--seq-length", "16384")
    assert status == 2 and not out
    assert err.startswith("error: the layout does not fit: pipeline stage 0 needs about")
    others = err.strip().partition("layouts that do: ")[2].split("; ")
    assert len(others) == 3
    for flags in others[:1]:
        status, out, err = run(
            "--gpus", "8x80gib", "--check", "--seq-length", "16384", *flags.split()
        )
        assert status == 0, err


def test_transformer_engine_needs_another_amount(run):
    words = ("--gpus", "8x200gib", "--check", "--seq-length", "1024")
    local, theirs = (float(run(*words, *more)[1].split()[1]) for more in ([], ["--with-te"]))
    assert 0.05 < abs(theirs - local) < 0.05 * local


def test_a_node_is_planned_for_and_not_this_host(run, tmp_path):
    """Messages overlap there by default, and Transformer Engine's flags are taken."""
    words = ("--gpus", "16xh100", "--seq-length", "8192", "--global-batch-size", "16")
    (tmp_path / "apart.yaml").write_text("overlap_grad_reduce: false\n")
    whole = ("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4")
    fast, same, slow = (
        float(rows(run(*words, *more)[1])[0][8])
        for more in ((), whole, ("--config", str(tmp_path / "apart.yaml")))
    )
    assert fast == same < slow
    for flag in ("--fp8-format hybrid", "--cpu-offloading-num-layers 2"):
        status, out, err = run("--gpus", "8xh100", "--with-te", "--check", *flag.split())
        assert status == 0 and out.startswith(f"not checked: {flag.split()[0]}: "), err


def test_check_says_what_it_cannot_foretell_and_refuses_no_run_for_it(run):
    status, out, _ = run("--gpus", "8xh100", "--check", "--model-backend", "transformers")
    assert status == 0 and out.startswith("not checked: --model-backend transformers")
    status, _, err = run("--gpus", "8xh100", "--model-backend", "transformers")
    assert status == 2 and "cannot be foretold" in err


def test_nothing_fits(run):
    status, out, _ = run("--gpus", "2x16gib", "--seq-length", "2048")
    assert status == 2 and "nothing fits into 16.0 GiB a device" in out


@pytest.mark.parametrize("text", ["8", "0xh100", "8xq100", "8x0gib", "xh100"])
def test_devices_that_nobody_knows(text):
    with pytest.raises(SetupError, match=f"--gpus {text}: expects NUMBERxKIND"):
        Machines.of(text, 8)


def test_devices_that_fill_no_node(run):
    status, _, error = run("--gpus", "12xh100")
    assert status == 2 and "no whole nodes of --gpus-per-node 8" in error


def test_the_command_takes_back_what_the_layout_has_no_more(run):
    """Also flags of a recipe, which stay in the command."""
    words = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()
    status, out, _ = run("--gpus", "8x400gib", *words)
    flags = shlex.split(out.strip().splitlines()[-1])
    for name in words[::2]:
        last = max(place for place, word in enumerate(flags) if word == name)
        assert flags[last + 1] == "1"
    assert status == 0 and rows(out)[0][:2] == ["1", "1"]


def test_where_times_are_not_known_the_model_is_cut_into_few_parts(run):
    status, out, _ = run("--gpus", "8x80gib", "--seq-length", "2048", "--use-torch-fsdp2")
    assert status == 0 and rows(out)[0][:7] == ["1", "1", "1", "1", "8", "1", "none"]


@pytest.mark.parametrize(
    "flags",
    [
        "--seq-length 100",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 10",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 7 --global-batch-size 64",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank=2 --global-batch-size 64 "
        "--microbatch-group-size-per-virtual-pipeline-stage 4",
    ],
)
def test_every_command_is_one_that_a_run_takes(run, tmp_path, monkeypatch, flags):
    run("--gpus", "8x80gib")  # writes the configuration
    words = ["--hf-model", str(tmp_path), *flags.split()]
    machines = Machines.of("8x80gib", 8)
    args = plan.resolve(words, machines, False)
    plans = ranked(args, machines)
    assert plans
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    for each in (plans[0], plans[-1], *plans[1:-1:4]):
        typed = shlex.split(plan.command(each, words, args, machines))
        parse_arguments(typed[typed.index("finetune.py") + 1 :])
