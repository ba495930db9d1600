"""What cannot work of steps, intervals and learning rates is refused by name, before any process starts."""

import argparse
import types

import pytest
from megatron.training import training

from post_training.arguments.completion import validate
from post_training.arguments.parser import parse_arguments
from post_training.arguments.ranges import NEVER
from post_training.arguments.schedule import check_learning_rate, check_step_flags
from post_training.errors import SetupError
from tests.helpers.launch import NO_PROCESS_GROUP, finetune


@pytest.fixture(scope="module")
def parse(hf_model, tmp_path_factory):
    words = ["--hf-model", str(hf_model("qwen3")), "--train-iters", "10"]
    words += ["--output-dir", str(tmp_path_factory.mktemp("run") / "out")]
    return lambda *flags: parse_arguments([*words, *flags])


@pytest.fixture(scope="module")
def given(parse):
    """Arguments as if these flags had been given; the parser takes its time, so it ran once."""
    parsed = vars(parse())

    def given(**flags):
        return argparse.Namespace(**parsed | {"derived": list(parsed["derived"])} | flags)

    return given


def test_they_are_checked_when_arguments_are_parsed(parse):
    with pytest.raises(SetupError, match="give either --lr-warmup-fraction or"):
        parse("--lr-warmup-fraction", "0.5", "--lr-warmup-iters", "1")


WSD = {"lr_decay_style": "WSD"}
RAISED = {"weight_decay_incr_style": "linear"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"save_retain_interval": 700, "save_interval": NEVER},
            "700: must be a multiple of --save-interval, which is off",
        ),
        ({"save_retain_interval": 700}, "700: must be a multiple of --save-interval, which is 500"),
        ({"min_lr": 1e-2, "lr": 1e-3}, "--min-lr 0.01: must be between 0 and --lr, which is 0.001"),
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0: must be between 0 and --lr"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "give either --lr-warmup-fraction or"),
        ({"lr_warmup_iters": 10}, "at step 10 (--train-iters); use fewer than 10"),
        (
            {"lr_warmup_iters": 5, "lr_decay_iters": 4},
            "at step 4 (--lr-decay-iters); use fewer than 4",
        ),
        (
            {"lr_warmup_iters": 5, "lr_decay_iters": 4, "train_iters": None, "num_epochs": 1},
            "at step 4 (--lr-decay-iters)",
        ),
        ({"fp16": True, "bf16": True}, "give either --fp16 or --bf16"),
        ({"loss_scale": 4.0}, "--loss-scale 4.0: does nothing in fp32"),
        (
            {"fp16": True, "initial_loss_scale": 2.0, "min_loss_scale": 4.0},
            "--min-loss-scale 4.0: must be at most --initial-loss-scale, which is 2.0",
        ),
        (
            {"profile": True, "profile_step_start": 9, "profile_step_end": 2},
            "--profile-step-end 2: must be above --profile-step-start, which is 9",
        ),
        (WSD, "--lr-wsd-decay-iters says over how many steps at the end"),
        ({**WSD, "lr_wsd_decay_iters": 9, "lr_warmup_iters": 2}, "warm-up leaves 8"),
        ({"start_weight_decay": 0.1}, "--start-weight-decay: weight decay is constant"),
        (RAISED, "which are None and None"),
        (
            {**RAISED, "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "which are 0.2 and 0.1",
        ),
    ],
)
def test_what_cannot_work_is_refused(given, flags, told):
    with pytest.raises(SetupError) as error:
        check_step_flags(given(**flags))
    assert told in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"lr_warmup_iters": 9},
        {"lr_warmup_fraction": 0.99},
        {"lr_warmup_iters": 100, "lr_decay_iters": 101},
        {**WSD, "lr_wsd_decay_iters": 8, "lr_warmup_iters": 2},
        {"lr_decay_style": "constant", "min_lr": 1e-6, "lr_warmup_init": 1e-7},
        {"lr": 0.0},
        {"save_retain_interval": 1000},
        {**RAISED, "start_weight_decay": 0.0, "end_weight_decay": 0.1},
    ],
)
def test_what_works_is_taken_by_megatrons_schedule_at_every_step(given, monkeypatch, flags):
    args = given(**flags)
    check_step_flags(args)
    validate(args)
    monkeypatch.setattr(training, "get_args", lambda: args)
    optimizer = types.SimpleNamespace(param_groups=[{"default_config": True}])
    scheduler = training.get_optimizer_param_scheduler(optimizer)
    for _ in range(args.train_iters):
        scheduler.step(args.global_batch_size)
        assert 0 <= optimizer.param_groups[0]["lr"] <= args.lr


def test_steps_of_epochs_are_checked_once_they_are_known(given):
    args = given(train_iters=None, num_epochs=1, lr_warmup_iters=100)
    check_step_flags(args)
    args.train_iters = 12
    with pytest.raises(SetupError, match=r"at step 12 \(--num-epochs 1\); use fewer than 12"):
        check_learning_rate(args)


def test_evaluation_alone_has_no_learning_rate(given):
    check_step_flags(given(skip_train=True, lr_warmup_iters=100))


def test_a_condition_without_a_message_is_named(given):
    """As Megatron's source has it, with the values."""
    with pytest.raises(SetupError) as error:
        validate(given(log_memory_interval=3, log_interval=2))
    line = "`assert args.log_memory_interval % args.log_interval == 0` fails in arguments.py, line "
    assert str(error.value).startswith(f"Megatron refuses these flags: {line}")
    assert str(error.value).endswith(", where log_memory_interval is 3, log_interval is 2")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recompute-num-layers", "2"], "does nothing without --recompute-granularity full"),
        (
            ["--recompute-granularity", "full", "--recompute-method", "block"],
            "--recompute-num-layers says how many layers",
        ),
        (["--recompute-modules", "mlp"], "does nothing without --recompute-granularity selective"),
        (["--recompute-modules", "layernorm"], "layernorm needs Transformer Engine; core_attn"),
        (["--recompute-modules", "mla_up_proj"], "mla_up_proj needs Transformer Engine; core_attn"),
        (["--tp-comm-overlap"], "--tp-comm-overlap needs Transformer Engine"),
        (["--account-for-embedding-in-pipeline-split"], "--decoder-first-pipeline-num-layers"),
        (["--account-for-loss-in-pipeline-split"], "--pipeline-model-parallel-layout in its place"),
        (["--pipeline-model-parallel-layout", "Ex|tL"], "layout Ex|tL: Invalid layer character: x"),
    ],
)
def test_a_step_that_cannot_be_carried_out_is_refused(parse, flags, expected):
    with pytest.raises(SetupError) as error:
        parse(*flags)
    assert expected in str(error.value)


def test_full_recomputation_is_of_every_layer(parse):
    args = parse("--recompute-granularity", "full")
    assert (args.recompute_method, args.recompute_num_layers) == ("uniform", 1)
    assert {"recompute_method", "recompute_num_layers"} <= set(args.derived)
    validate(args)


@pytest.mark.slow
def test_the_models_own_checks_come_before_any_process_group(hf_model, chat_data, tmp_path):
    """Of Megatron's configuration, in one message for all ranks."""
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--train-iters", "3", "--recompute-granularity", "selective"),
        *("--recompute-modules", "nothing"),
        world=2,
        environment={NO_PROCESS_GROUP: "1"},
    )
    assert run.statuses == [2, 2] and "Traceback" not in run.console
    (line,) = [line for line in run.console.splitlines() if line.startswith("error")]
    assert line.startswith("error: Megatron refuses these flags") and "nothing" in line
