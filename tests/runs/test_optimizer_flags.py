"""Every flag of the optimizer and its schedule, given otherwise when a run is resumed.

Either it is taken over: then the weights are, bit for bit, those of an optimizer that had it from the
start and whose tensors were copied by hand at that step, and others than without the change. Or the run
is refused before a process group starts.
"""

import argparse
import dataclasses

import pytest
from megatron.core.optimizer import OptimizerConfig
from megatron.training.arguments import add_megatron_arguments

from post_training.arguments.parser import parse_arguments
from post_training.arguments.refused import MegatronFlags
from post_training.checkpoint import store
from post_training.checkpoint.optimizer_form import _AS_GIVEN
from post_training.checkpoint.origin import check_origin, origin
from post_training.errors import SetupError
from tests.helpers import optimizer_walk
from tests.helpers.launch import run_ranks

GROUPS = ("regularization", "learning rate and weight decay", "mixed precision")
"""Of Megatron's parser; flags elsewhere are known by `OptimizerConfig`."""


def _adds(before: str, change: str) -> tuple[str, str]:
    return before, f"{before} {change}"


WSD = "--lr-decay-style WSD --lr-wsd-decay-iters 19"
RISING = "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.2"
QK = "--no-weight-decay-cond-type apply_wd_to_qk_layernorm"
FP16 = "--fp16 --initial-loss-scale 32768"
GROWS = f"{FP16} --loss-scale-window 1"
OVERFLOWS = "--fp16 --initial-loss-scale 262144 --hysteresis 1"

TAKEN = {
    # By destination name: what the run before says, and the run after; besides `WORDS`.
    "lr": _adds("", "--lr 5e-3"),
    "min_lr": _adds("", "--min-lr 5e-3"),
    "decoupled_lr": _adds("", "--decoupled-lr 2e-2"),
    "decoupled_min_lr": _adds("--decoupled-lr 2e-2", "--decoupled-min-lr 1e-2"),
    "lr_decay_style": _adds("", "--lr-decay-style linear"),
    "lr_decay_iters": _adds("", "--lr-decay-iters 5"),
    "lr_wsd_decay_style": _adds(WSD, "--lr-wsd-decay-style linear"),
    "lr_wsd_decay_iters": _adds(WSD, "--lr-wsd-decay-iters 18"),
    "lr_warmup_fraction": _adds("", "--lr-warmup-fraction 0.5"),
    "lr_warmup_iters": _adds("", "--lr-warmup-iters 6"),
    "lr_warmup_init": _adds("--lr-warmup-iters 6", "--lr-warmup-init 1e-4"),
    "train_iters": _adds("", "--train-iters 10"),
    "weight_decay": _adds("", "--weight-decay 0.1"),
    "start_weight_decay": _adds(RISING, "--start-weight-decay 0.15"),
    "end_weight_decay": _adds(RISING, "--end-weight-decay 0.4"),
    "weight_decay_incr_style": _adds(RISING, "--weight-decay-incr-style cosine"),
    "apply_wd_to_qk_layernorm": _adds("--weight-decay 0.1", "--apply-wd-to-qk-layernorm"),
    "no_weight_decay_cond_type": _adds("--weight-decay 0.1", QK),
    "clip_grad": _adds("", "--clip-grad 0.5"),
    "adam_beta1": _adds("", "--adam-beta1 0.5"),
    "adam_beta2": _adds("", "--adam-beta2 0.5"),
    "adam_eps": _adds("", "--adam-eps 1e-3"),
    "sgd_momentum": _adds("--optimizer sgd", "--sgd-momentum 0.5"),
    "fp16": _adds("", "--fp16 --loss-scale 1024"),
    "bf16": _adds("", "--bf16"),
    "grad_reduce_in_bf16": _adds("--bf16", "--grad-reduce-in-bf16"),
    # Which steps are taken depends on the loss scale.
    "loss_scale": _adds(FP16, "--loss-scale 65536"),
    "min_loss_scale": _adds(OVERFLOWS, "--min-loss-scale 65536"),
    "loss_scale_window": _adds(FP16, "--loss-scale-window 3"),
    "hysteresis": _adds(GROWS, "--hysteresis 3"),
}
# The same in other forms of an optimizer's state; "whole" is Adam without the distributed optimizer.
FORMS = {
    "--optimizer sgd": ("lr", "min_lr", "decoupled_lr", "weight_decay", "apply_wd_to_qk_layernorm"),
    "--optimizer sgd --bf16": ("lr", "decoupled_lr", "sgd_momentum"),
    "--bf16": ("lr", "decoupled_lr", "adam_beta1"),
    "whole": ("lr", "decoupled_lr", "adam_beta2", "adam_eps"),
    "whole --bf16": ("lr", "decoupled_lr", "adam_beta1"),
    "--use-torch-fsdp2": ("lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_eps"),
    "--use-torch-fsdp2 --bf16": ("lr", "adam_beta2"),
    "--use-torch-fsdp2 --optimizer sgd": ("lr", "sgd_momentum"),
}
BACK = {
    "a constant loss scale no more": ("--fp16 --loss-scale 1024", f"{GROWS} --hysteresis 1"),
    "another precision": ("--bf16", "--fp16 --loss-scale 1024"),
    "no decoupled rate": ("--decoupled-lr 2e-2", ""),
    "no decoupled rate with sgd": ("--optimizer sgd --decoupled-lr 2e-2", "--optimizer sgd"),
    "the same rate decoupled": ("--optimizer sgd", "--optimizer sgd --decoupled-lr 1e-2"),
    "without momentum": (
        "--optimizer sgd --sgd-momentum 0",
        "--optimizer sgd --sgd-momentum 0 --lr 5e-3",
    ),
}
NO_EFFECT = {
    "optimizer works as before": "log_num_zeros_in_grad barrier_with_L1_time config_logger_dir",
    "messages and copies come at other times": (
        "overlap_param_gather overlap_param_gather_with_optimizer_step reuse_grad_buf_for_mxfp8_param_ag "
        "overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params"
    ),
    "nothing but the forward and backward pass": "fp8_recipe attention_softmax_in_fp32",
    "Megatron sets it itself": "accumulate_allreduce_grads_in_fp32 main_grads_dtype",
}
ALWAYS_REFUSED = {"warmup"}
"""By Megatron's own check, besides the table of `MegatronFlags`."""


def _flags() -> set[str]:
    """Of Megatron's parser, those that are about the optimizer or its schedule and are not refused."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = MegatronFlags(parser)
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert all(any(group.title == title for group in parser._action_groups) for title in GROUPS)
    found = {
        action.dest
        for group in parser._action_groups
        for action in group._group_actions
        if group.title in GROUPS or action.dest in fields
    }
    return found - known.refused.keys()


def test_no_flag_is_forgotten():
    harmless = {name for names in NO_EFFECT.values() for name in names.split()}
    refused = {*_AS_GIVEN, "initial_loss_scale"} | ALWAYS_REFUSED
    walked = TAKEN.keys() - {"train_iters"}
    assert walked | harmless | refused == _flags()
    assert len(walked) + len(harmless) + len(refused) == len(_flags()), "each in one list"


def _cases():
    yield pytest.param("", TAKEN, marks=pytest.mark.slow)
    yield "", BACK
    for form, names in FORMS.items():
        yield form, {name: tuple(f"{form} {words}" for words in TAKEN[name]) for name in names}


@pytest.mark.parametrize(("form", "cases"), list(_cases()))
def test_a_changed_flag_is_taken_over(hf_model, tmp_path, form, cases):
    folder = str(hf_model("qwen3"))
    for name, (same, moved) in run_ranks(optimizer_walk.walk, 1, folder, tmp_path, cases)[
        0
    ].items():
        assert same, f"{name}: other weights than with its tensors copied by hand"
        assert moved or name == "the same rate decoupled", f"{name}: the weights of the flag before"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("", "--optimizer sgd", "--optimizer adam, this run's is sgd"),
        ("--fp16", "--fp16 --initial-loss-scale 8", "--initial-loss-scale 4294967296.0, .* is 8.0"),
        ("--optimizer sgd", "--optimizer sgd --sgd-momentum 0", "--sgd-momentum above 0, .* is 0"),
        ("--optimizer sgd", "--optimizer sgd --bf16", "precision fp32, this run's is bf16 or fp16"),
        (
            "--use-torch-fsdp2",
            "--use-torch-fsdp2 --decoupled-lr 1",
            "--decoupled-lr not given, .* given",
        ),
        (
            "--use-torch-fsdp2 " + QK,
            "--use-torch-fsdp2",
            "--apply-wd-to-qk-layernorm True, .* False",
        ),
    ],
)
def test_another_form_of_the_state_is_refused(parse, written, before, after, told):
    _refuses(parse(after), written(parse(before)), told)


def test_a_state_of_other_types_or_places_is_refused(parse, written):
    args = parse("")
    checkpoint = written(args)
    check_origin(args, checkpoint)
    for name in _AS_GIVEN:  # most need CUDA
        other = argparse.Namespace(**vars(args) | {name: "another"})
        _refuses(other, checkpoint, f"--{name.replace('_', '-')} .*, this run's is another")


def _refuses(args, checkpoint, told):
    with pytest.raises(SetupError, match=f"optimizer's state of {told}.*--no-load-optim"):
        check_origin(args, checkpoint)
    args.no_load_optim = True
    check_origin(args, checkpoint)


@pytest.fixture
def written(tmp_path):
    def write(args):
        checkpoint = store.begin_save(tmp_path, 5)
        (checkpoint / "__0_0.distcp").write_bytes(b"weights")
        store.finish_save(tmp_path, 5, {"origin": origin(args)})
        return store.Checkpoint.at(checkpoint)

    return write


@pytest.fixture
def parse(hf_model, tmp_path):
    def parse(words):
        model = ["--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path / "out")]
        return parse_arguments([*model, "--train-iters", "9", *words.split()])

    return parse
