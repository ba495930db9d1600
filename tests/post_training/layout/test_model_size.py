import pytest

from post_training.arguments.parser import parse_arguments
from post_training.layout.model_size import checkpoint_bytes, count_parameters, shown_bytes
from tests.helpers.models import load_model


def test_parameters_are_counted(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder, out = str(hf_model("qwen3")), str(tmp_path / "out")
    args = parse_arguments(["--hf-model", folder, "--output-dir", out, "--train-iters", "1"])
    model = load_model(hf_model("qwen3"))
    parameters = sum(p.numel() for p in model.parameters())
    padding = 2 * (512 - 391) * 64
    assert count_parameters(args) == parameters + padding
    assert checkpoint_bytes(args) == 16 * (parameters + padding)
    args.bf16 = True
    assert checkpoint_bytes(args) == 14 * (parameters + padding)
    args.use_torch_fsdp2 = True  # the weights are the master weights
    assert checkpoint_bytes(args) == 12 * (parameters + padding)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4", "gpt_oss", "qwen3_moe"])
def test_parts_of_all_kinds_are_counted(hf_model, tmp_path, family):
    folder, out = str(hf_model(family)), str(tmp_path / "out")
    args = parse_arguments(["--hf-model", folder, "--output-dir", out, "--train-iters", "1"])
    parameters = sum(p.numel() for p in load_model(hf_model(family)).parameters())
    assert count_parameters(args) == parameters + 2 * (512 - 391) * 64


@pytest.mark.parametrize(("count", "text"), [(3 * 2**29, "1.5 GiB"), (3 * 2**19, "1.5 MiB")])
def test_sizes_in_words(count, text):
    assert shown_bytes(count) == text
