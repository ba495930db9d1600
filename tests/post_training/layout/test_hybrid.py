"""What a model with state-space layers does not go with, in one line before anything starts."""

import pytest

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError


@pytest.mark.parametrize(
    ("world", "words", "said"),
    [
        (2, "--context-parallel-size 2", "--context-parallel-size 2: a state runs"),
        (4, "--tensor-model-parallel-size 4", "2 groups of state-space heads"),
        (3, "--pipeline-model-parallel-size 3", r"4 layers \(M-\*E\) cannot be divided"),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
            "a stage is one piece",
        ),
        (
            2,
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
            "stages hold equal numbers",
        ),
        (1, "--use-torch-fsdp2", "add --model-backend transformers"),
        (1, "--lora-rank 4", "take no factors, in --model-backend transformers they do"),
        (1, "--export-quant-cfg INT8_DEFAULT_CFG", "not quantised"),
    ],
)
def test_refused(hf_model, tmp_path, monkeypatch, world, words, said):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(world)), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    own = ["--hf-model", str(hf_model("nemotron_h")), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SetupError, match=said):
        parse_arguments([*own, "--train-iters", "1", "--seq-length", "96", *words.split()])


TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("nemotron_h", {"intermediate_size": 95}, "the model's feed-forward size 95"),
        (
            "nemotron_h",
            {"moe_shared_expert_intermediate_size": 33},
            "the shared experts' feed-forward size 33",
        ),
        ("deepseek_v3", {"moe_intermediate_size": 47}, "the shared experts' feed-forward size 47"),
    ],
)
def test_what_is_cut_beside_whole_experts(hf_model, tmp_path, monkeypatch, family, options, said):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    own = ["--hf-model", str(hf_model(family, **options)), "--output-dir", str(tmp_path / "out")]
    whole = ["--expert-tensor-parallel-size", "1", "--train-iters", "1", "--seq-length", "96"]
    with pytest.raises(SetupError, match=f"--tensor-model-parallel-size 2: {said} cannot be"):
        parse_arguments([*own, *TP2, *whole])
