import pytest

from post_training.arguments import parse_arguments
from post_training.errors import SetupError
from tests.helpers.launch import NO_PROCESS_GROUP, finetune


@pytest.fixture
def words(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder = str(hf_model("qwen3"))
    return ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recompute-num-layers", "0"], "--recompute-num-layers 0: must be at least 1"),
        (["--recompute-modules", "layernorm"], "layernorm needs Transformer Engine; core_attn"),
        (["--tp-comm-overlap"], "--tp-comm-overlap needs Transformer Engine"),
        (["--account-for-embedding-in-pipeline-split"], "--decoder-first-pipeline-num-layers"),
        (["--account-for-loss-in-pipeline-split"], "--pipeline-model-parallel-layout in its place"),
        (["--pipeline-model-parallel-layout", "Ex|tL"], "layout Ex|tL: Invalid layer character: x"),
    ],
)
def test_what_cannot_work_is_refused(words, flags, expected):
    with pytest.raises(SetupError) as error:
        parse_arguments([*words, *flags])
    assert expected in str(error.value)


@pytest.mark.slow
def test_the_models_own_checks_come_before_any_process_group(hf_model, chat_data, tmp_path):
    """Of Megatron's configuration, in one message for all ranks."""
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--train-iters", "3", "--recompute-granularity", "full"),
        world=2,
        environment={NO_PROCESS_GROUP: "1"},
    )
    assert run.statuses == [2, 2] and "Traceback" not in run.console
    (line,) = [line for line in run.console.splitlines() if line.startswith("error")]
    assert line.startswith("error: Megatron refuses these flags") and "recompute_method" in line
