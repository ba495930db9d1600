"""Every recipe goes through a run's checks, and its stages hold the whole model; a command builds them all.

python -m tests.recipes.stages      (minutes)
"""

import pytest

from post_training.errors import SetupError
from post_training.hf.families import FAMILIES
from post_training.layout.planner import Machines, plan_of
from tests.helpers.launch import run_rank
from tests.recipes import stages

MODELS = sorted(
    file.stem.replace("--", "/") for file in stages.FOLDER.glob("*.json")
)  # with the source of their numbers
BUILT = ("Qwen/Qwen2.5-0.5B.2x8", "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-30B-A3B")


# No node of 8 holds its weights: LoRA is for several, too.
LARGER_THAN_A_NODE = {"deepseek-ai/DeepSeek-V3"}


def test_every_model_has_a_recipe_for_one_node_and_one_for_several():
    names = {str(file.relative_to(stages.CONF)).removesuffix(".yaml") for file in stages.RECIPES}
    assert names >= set(MODELS) - LARGER_THAN_A_NODE
    for model in MODELS:
        several = [name for name in names if name.startswith(f"{model}.") and name.endswith("x8")]
        assert len(several) == 1 + (model in LARGER_THAN_A_NODE), model
        assert stages.facts(model)["source"].startswith("https://")
    assert len(names) == 2 * len(MODELS)
    families = {stages.facts(model)["config"]["architectures"][0] for model in MODELS}
    assert families == FAMILIES.keys()
    for file in stages.RECIPES:
        assert "# Source" in file.read_text() or "base: " in file.read_text(), file


# What state-space layers keep is not counted.
NOT_FORETOLD = {"Mamba-Codestral-7B-v0.1", "Nemotron-H-8B-Base-8K"}


@pytest.mark.slow
def test_every_recipe_passes_the_checks_of_a_run_and_fits_its_nodes(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for file in stages.RECIPES:
        monkeypatch.setenv("WORLD_SIZE", str(stages.processes(file)))
        args = stages.parsed(file, tmp_path)
        assert args.bf16 and args.lr and args.global_batch_size % 8 == 0, file
        if file.name.partition(".yaml")[0].removesuffix(".2x8") not in NOT_FORETOLD:
            machines = Machines.of(f"{stages.processes(file)}xh100", 8)
            assert plan_of(args, machines).needed <= machines.memory, file
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(SetupError, match="12 processes cannot be divided"):
        stages.parsed(stages.CONF / "meta-llama/Llama-3.3-70B-Instruct.yaml", tmp_path)


@pytest.mark.slow
def test_stages_hold_the_whole_model():
    for name, found in zip(BUILT, run_rank(stages.built, BUILT), strict=True):
        whole, factors, count = found
        model = name.removesuffix(".2x8")
        assert whole == stages.facts(model)["parameters"], name
        assert bool(factors) == ("70B" in name) and count == (2 if "30B" in name else 1)
