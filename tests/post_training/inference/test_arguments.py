"""Any run can be read for inference, whatever it was trained with."""

import argparse
import dataclasses

import pytest
import torch
import yaml
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments
from transformers import AutoConfig, AutoTokenizer

from post_training.arguments.completion import complete_inference, validate
from post_training.arguments.config_file import resolved_config, write_config
from post_training.arguments.parser import add_finetune_arguments, parse_arguments
from post_training.arguments.refused import ARCHITECTURE, NEEDS_CUDA, NEEDS_TRANSFORMER_ENGINE
from post_training.errors import SetupError
from post_training.inference.arguments import FOR_INFERENCE, arguments_of_hf_model, arguments_of_run
from post_training.job.output import MODEL_FOLDER
from tests.helpers.models import edit_json

# Known to be refused, or not to be had, on a machine that only reads what a cluster has trained.
OF_TRAINING = """
    attention_backend fp8 tp_comm_overlap use_precision_aware_optimizer optimizer_cpu_offload
    cuda_graph_impl profile moe_grouped_gemm moe_permute_fusion distributed_backend transformer_impl
    use_persistent_ckpt_worker async_save wandb_project fp32_residual_connection use_torch_fsdp2
    use_cpu_initialization tensor_model_parallel_size pipeline_model_parallel_layout
    cross_entropy_loss_fusion save_hf ckpt_format chat_template moe_aux_loss_coeff recompute_modules
    overlap_grad_reduce finetune_data_files micro_batch_size num_epochs train_iters keep_checkpoints
""".split()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it


@pytest.fixture
def trained(hf_model, tmp_path, monkeypatch):
    """Makes what a run on `world` processes leaves in its folder, without its checkpoints."""

    def trained(*flags, family=None, world=1):
        folder = tmp_path / "run"
        monkeypatch.setenv("WORLD_SIZE", str(world))
        model = [] if family is None else ["--hf-model", str(hf_model(family))]
        args = parse_arguments([*model, *flags, "--output-dir", str(folder), "--train-iters", "3"])
        monkeypatch.setenv("WORLD_SIZE", "1")
        folder.mkdir()
        write_config(resolved_config(args), args.derived, folder / "config.yaml")
        if family is not None:
            for kind in (AutoConfig, AutoTokenizer):
                kind.from_pretrained(hf_model(family)).save_pretrained(folder / MODEL_FOLDER)
        return args, folder, yaml.safe_load((folder / "config.yaml").read_text())

    return trained


def plain(args):
    return {key: value for key, value in vars(args).items() if key != "hf_config"}


def test_what_a_run_says_of_training_is_not_read(trained):
    """Not even parsed: every other flag of the parser holds what none of them takes."""
    _, folder, config = trained("--bf16", family="qwen3_moe")
    expected = arguments_of_run(folder, config)
    assert expected.bf16 and expected.transformer_impl == "local"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_finetune_arguments(add_megatron_arguments(parser))
    others = {action.dest for action in parser._actions} - FOR_INFERENCE
    named = {*NEEDS_TRANSFORMER_ENGINE, *NEEDS_CUDA, *OF_TRAINING} - set(ARCHITECTURE)
    assert named <= others
    changed = config | dict.fromkeys(others | {"no_longer_a_flag"}, "what nobody would write")
    assert plain(arguments_of_run(folder, changed)) == plain(expected)


@pytest.mark.parametrize(
    ("family", "flags", "world", "other"),
    [
        (
            None,
            "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --group-query-attention "
            "--num-query-groups 2 --position-embedding-type "
            "learned_absolute --max-position-embeddings 300 --seq-length 200 --fp16 --hf-tokenizer x "
            "--vocab-size 391 --make-vocab-size-divisible-by 96 --untie-embeddings-and-output-weights "
            "--squared-relu --norm-epsilon 1e-4 --tensor-model-parallel-size 2 --sequence-parallel "
            "--hidden-dropout 0.1",
            2,
            {"sequence_parallel", "hidden_dropout"},
        ),
        (
            "qwen3_moe",
            "--bf16 --moe-router-dtype fp64 --seq-length 1024 --use-torch-fsdp2 --moe-input-jitter-eps 0.1",
            2,
            # FSDP2 keeps fp32 shards of such a run, and computes in bf16.
            {"bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "moe_input_jitter_eps"},
        ),
    ],
)
def test_the_model_is_the_one_that_was_trained(trained, family, flags, world, other):
    args, folder, config = trained(*flags.split(), family=family, world=world)
    found = arguments_of_run(folder, config)
    for each in (args, found):
        each.num_workers = 0
        validate(each)
    ours, theirs = (gpt_config_from_args(each) for each in (found, args))

    def fields(config):
        named = {field.name for field in dataclasses.fields(config)} - {"transformer"}
        return {name: value for name in named if not callable(value := getattr(config, name))}

    assert fields(ours) == fields(theirs)
    ours, theirs = fields(ours.transformer), fields(theirs.transformer)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert {
        name for name in changed if "tensor_parallel" not in name and "tensor_model" not in name
    } == other


def test_the_precision_is_the_runs_on_any_machine(trained):
    """A GPU's default is bf16, a CPU's is fp32."""
    _, folder, config = trained(family="qwen3")
    assert arguments_of_run(folder, config).fp32
    args = arguments_of_run(folder, config | {"bf16": True})
    assert args.bf16 and not args.fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_huggingface_folder_is_read_in_the_precision_that_it_names(hf_model, tmp_path, dtype):
    AutoConfig.from_pretrained(hf_model("mistral")).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype=str(dtype).removeprefix("torch."), sliding_window=100)
    args = arguments_of_hf_model(str(tmp_path))
    complete_inference(args)
    validate(args)
    assert args.params_dtype == dtype and args.load is args.save is None


def test_norms_that_only_transformer_engine_computes_need_it(trained):
    _, folder, config = trained(family="qwen3")
    with pytest.raises(SetupError, match="trained with --apply-layernorm-1p: only Tr"):
        arguments_of_run(folder, config | {"layernorm_zero_centered_gamma": True})
