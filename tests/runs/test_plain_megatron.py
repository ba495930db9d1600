"""A checkpoint that Megatron's plain `pretrain()` wrote: its weights are taken, and nothing else."""

import pytest
import torch

from tests.helpers.checkpoint import tensors
from tests.helpers.launch import NO_PROCESS_GROUP, finetune, run_rank, run_script
from tests.helpers.reference import Recipe

# What a step changes nothing with.
STILL = ("--lr", "0", "--weight-decay", "0")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["plain", "dist"])
def test_its_weights_are_taken_with_finetune(hf_model, chat_data, tmp_path, optimizer):
    model, plain = str(hf_model("qwen3")), tmp_path / "plain"
    written = run_script("tests/helpers/plain_pretrain.py", model, str(plain), *optimizer)
    assert written.returncode == 0, written.stderr[-3000:]
    words = ["--hf-model", model, "--finetune-data-files", str(chat_data.file)]
    words += [*Recipe(steps=2).flags(), *STILL, "--load", str(plain)]
    refused = finetune(tmp_path / "out", *words, environment={NO_PROCESS_GROUP: "1"})
    (line,) = refused.console.splitlines()
    assert refused.status == 2 and line.startswith(f"error: {plain}/iter_0000002 has no manifest")
    assert line.endswith(f"--load {plain} --finetune")

    words += ["--finetune", "--save-interval", "1"]
    run = finetune(tmp_path / "out", *words, "--exit-interval", "1", world=2).ok()
    before = run_rank(tensors, plain / "iter_0000002")
    after = run_rank(tensors, run.folder / "checkpoints/iter_0000001")
    weights = [name for name in before if name.startswith(("decoder.", "embedding."))]
    assert len(weights) == 10 and all(before[n].equal(after[n]) for n in weights)
    moments = [name for name in after if "exp_avg" in name]
    assert moments and not any(
        name in before and before[name].equal(after[name]) for name in moments
    )
    assert len({torch.linalg.vector_norm(before[n]).item() for n in weights}) > 8, "it was trained"

    # The same command again continues, and says which flag that leaves out.
    again = finetune(tmp_path / "out", *words, world=2).ok()
    assert [step["iteration"] for step in again.steps] == [1, 2]
    assert "--finetune is left out" in again.console
