"""What computes a model: chosen from its config.json alone, and what does not go with it."""

import pytest

from model_provider import check_weights
from post_training.arguments.backend import model_backend
from post_training.arguments.command_line import CommandLine
from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from tests.helpers.models import edit_json, save_model


def parsed(folder, tmp_path, *flags):
    return parse_arguments(
        [
            *("--hf-model", str(folder), "--output-dir", str(tmp_path / "out")),
            *("--train-iters", "1", "--seq-length", "64", *flags),
        ]
    )


def test_megatron_where_it_can(hf_model, tmp_path):
    args = parsed(hf_model("qwen3"), tmp_path)
    assert (args.model_backend, args.use_torch_fsdp2, args.backend_reason) == (
        "megatron",
        False,
        None,
    )
    args = parsed(hf_model("qwen3"), tmp_path, "--model-backend", "transformers")
    assert (args.model_backend, args.use_torch_fsdp2) == ("transformers", True)
    assert args.ckpt_format == "torch_dcp" and not args.use_distributed_optimizer


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {}, "architecture MambaForCausalLM cannot be loaded"),
        ("qwen3", {"attention_bias": True}, "attention_bias True is not supported for Qwen3"),
    ],
)
def test_else_the_class_of_transformers(hf_model, tmp_path, family, changes, reason):
    folder = hf_model(family)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    edit_json(tmp_path / "config.json", **changes)
    args = parsed(tmp_path, tmp_path)
    assert (args.model_backend, args.use_torch_fsdp2) == ("transformers", True)
    assert args.backend_reason.startswith(reason)
    # Known before CUDA starts, from the words or the file.
    assert CommandLine(["--hf-model", str(tmp_path)]).asks_for_fsdp2()
    assert CommandLine([], {"hf_model": str(tmp_path)}).asks_for_fsdp2()
    assert not CommandLine(["--hf-model", str(folder / "nowhere")]).asks_for_fsdp2()
    with pytest.raises(SetupError, match=f"{reason}.*; --model-backend transformers computes it"):
        parsed(tmp_path, tmp_path, "--model-backend", "megatron")


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--context-parallel-size 2",
        "--expert-model-parallel-size 2",
        "--num-layers-per-virtual-pipeline-stage 1",
        "--sequence-parallel",
        "--draft eagle3",
        "--export-kd-teacher-load somewhere",
        "--offline-distillation-data somewhere",
        "--hidden-dropout 0.1",
        "--recompute-granularity selective",
        "--fp16",
        # Read by Megatron's layers, or of tensors that they mark.
        "--decoupled-lr 0.1",
        "--apply-wd-to-qk-layernorm",
        "--init-method-std 0.5",
        "--moe-input-jitter-eps 0.1",
        "--moe-layer-recompute",
        "--mlp-chunks-for-training 2",
    ],
)
def test_what_only_megatron_can_is_refused(hf_model, tmp_path, flags):
    flag = flags.split()[0]
    message = f"^{flag}.*own class of transformers.*architecture MambaForCausalLM"
    with pytest.raises(SetupError, match=message):
        parsed(hf_model("mamba"), tmp_path, *flags.split())


def test_the_backend_needs_a_model_and_fsdp2(hf_model, tmp_path):
    with pytest.raises(SetupError, match="needs --hf-model"):
        parse_arguments(
            [
                *("--output-dir", str(tmp_path), "--model-backend", "transformers"),
                *("--num-layers", "2", "--train-iters", "1"),
            ]
        )
    config = tmp_path / "run.yaml"
    config.write_text("use_torch_fsdp2: false\n")
    with pytest.raises(SetupError, match="with --use-torch-fsdp2 only"):
        parsed(hf_model("mamba"), tmp_path, "--config", str(config))


def test_a_model_that_cannot_be_read_is_told_later(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert model_backend("auto", str(tmp_path)) == ("megatron", None)
    assert model_backend("transformers", str(tmp_path)) == ("transformers", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": -1}, "config.json"),
        ({"attention_bias": True, "hidden_act": "x"}, r"cannot be built \(KeyError: 'x'\)"),
    ],
)
def test_values_that_no_model_has_are_refused(tmp_path, changes, message):
    folder = save_model(tmp_path / "model", "qwen3")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(SetupError, match=message):
        args = parsed(folder, tmp_path)
        check_weights(args, None)


def test_a_damaged_generation_config_is_met_at_the_start(tmp_path):
    """It goes along with what is exported: nothing could answer with the trained model."""
    folder = save_model(tmp_path / "model", "qwen3")
    args = parsed(folder, tmp_path)
    for content in ("", "[]"):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(SetupError, match="generation_config.json"):
            check_weights(args, None)
