import importlib.machinery
import sys
import types

import pytest
import torch

from post_training.arguments import completion, defaults, parser
from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes flags believe in a GPU, and in Transformer Engine on it."""

    def pretend(capability=(9, 0), packages=()):
        for module in (completion, defaults):
            monkeypatch.setattr(module, "device_type", lambda: "cuda")
        monkeypatch.setattr(parser, "has_transformer_engine", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
        for name in packages:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    return pretend


@pytest.fixture
def words(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    model = ["--hf-model", str(hf_model("qwen3_moe"))]
    return [*model, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]


def test_gradients_are_accumulated_in_the_kernel_only_where_apex_has_it(gpu, words):
    gpu()
    args = parse_arguments(words)
    assert args.transformer_impl == "transformer_engine"
    # Transformer Engine's own kernels, and none of Apex's.
    assert args.apply_rope_fusion and args.moe_grouped_gemm
    assert args.gradient_accumulation_fusion is False
    gpu(packages=["fused_weight_gradient_mlp_cuda"])
    assert parse_arguments(words).gradient_accumulation_fusion is True
    assert parse_arguments([*words, "--fp32"]).gradient_accumulation_fusion is False


@pytest.mark.parametrize(
    ("capability", "packages", "flags", "expected"),
    [
        ((9, 0), [], [], "transformer_engine"),
        ((8, 0), [], [], "local"),
        ((8, 0), ["flash_attn"], [], "transformer_engine"),
        ((9, 0), ["flash_attn"], ["--fp32"], "local"),
        ((9, 0), [], ["--fp16"], "transformer_engine"),
        # What is written wins.
        (
            (8, 0),
            [],
            ["--fp32", "--transformer-impl", "transformer_engine"],
            "transformer_engine",
        ),
        ((9, 0), [], ["--transformer-impl", "local"], "local"),
    ],
)
def test_layers_are_local_where_transformer_engine_would_pad_packs(
    gpu, words, capability, packages, flags, expected
):
    gpu(capability, packages)
    args = parse_arguments([*words, *flags])
    assert args.transformer_impl == expected
    assert args.apply_rope_fusion is (expected == "transformer_engine")
    assert args.moe_grouped_gemm is (expected == "transformer_engine")


def test_fp32_of_a_config_file_counts_too(gpu, words, tmp_path):
    gpu()
    file = tmp_path / "config.yaml"
    file.write_text("fp32: true\n")
    assert parse_arguments([*words, "--config", str(file)]).transformer_impl == "local"


def test_experts_with_factors_are_computed_one_by_one(gpu, words):
    gpu()
    lora = [*words, "--lora-rank", "4", "--lora-targets"]
    for targets, grouped in (("attention", True), ("all", False)):
        args = parse_arguments([*lora, targets])
        assert args.transformer_impl == "transformer_engine"
        assert args.moe_grouped_gemm is grouped
    assert parse_arguments([*lora, "attention", "--moe-grouped-gemm"]).moe_grouped_gemm is True
    with pytest.raises(
        SetupError, match="--moe-grouped-gemm: --lora-targets names matrices of exp"
    ):
        parse_arguments([*lora, "all", "--moe-grouped-gemm"])
    gpu(capability=(7, 5))
    te = ["--transformer-impl", "transformer_engine"]
    assert parse_arguments([*lora, "attention", *te]).moe_grouped_gemm is False


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--fp8-format", "hybrid"], "--fp8-format hybrid: not with --lora-rank: factors"),
        (["--fp4-format", "e2m1"], "--fp4-format e2m1: not with --lora-rank: factors"),
        (["--optimizer-cpu-offload"], "stay on the device"),
        (["--use-precision-aware-optimizer"], "their own master copies"),
    ],
)
def test_what_transformer_engine_can_and_factors_cannot(gpu, words, flags, told):
    gpu()
    parse_arguments([*words, *flags])
    with pytest.raises(SetupError, match=told):
        parse_arguments([*words, *flags, "--lora-rank", "4"])
