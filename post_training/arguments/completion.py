"""The one place that completes `args`: what follows from the flags, then what Megatron is to see of a run.

    complete_flags      at the end of parsing: what follows from the flags alone, and data are prepared by
    complete_run        once checkpoint, data and evaluation are known: what Megatron must see of them
    complete_inference  in the place of it for one whole model in one process
    validate            Megatron's own checks, and what it would not have taken before them

Behind `validate` nothing of this project changes `args`; what is found later is handed on by name.
`tests/post_training/arguments/test_completion.py` looks for assignments elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import os

import torch

from post_training.adapters.flags import lora_of
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.arguments.backend import check_task, check_transformers
from post_training.arguments.distillation import complete_distillation
from post_training.arguments.experts import complete_expert_flags
from post_training.arguments.schedule import check_step_flags, complete_recomputation
from post_training.errors import SetupError, failed_condition
from post_training.layout import hybrid, sizes
from post_training.machine.device import device_type
from post_training.machine.kernels import has_grouped_gemm
from post_training.quantisation.formats import quantisation_of

# Set-up, the first step, an evaluation's first batch and saving may take this many times as long as an
# ordinary step.
PATIENCE = 6


def complete_flags(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags, and check what can be checked before the data are known.

    Raises:
        SetupError: a missing or contradictory flag, a layout that cannot work.
    """
    if not args.output_dir:
        raise SetupError("--output-dir is missing: name a folder for checkpoints, metrics and logs")
    check_task(args)
    if args.hf_model is None and args.num_layers is None:
        raise SetupError(
            "--hf-model is missing: name a HuggingFace folder or hub name "
            "(or describe a model with --num-layers, --hidden-size and so on)"
        )
    if args.model_backend == "transformers":
        check_transformers(args)
    args.eval_only = args.skip_train = args.eval_only or args.skip_train
    if args.eval_only:
        _prepare_evaluation(args)
    if not args.calculate_per_token_loss:
        raise SetupError(
            "calculate_per_token_loss: false is refused: every trained token of a batch weighs the same"
        )
    if args.ckpt_format not in ("torch_dist", "torch_dcp"):
        raise SetupError(
            f"--ckpt-format {args.ckpt_format}: only torch_dist (and torch_dcp with --use-torch-fsdp2) "
            f"can be continued; leave the flag out"
        )
    if not args.skip_train and bool(args.train_iters) == bool(args.num_epochs):
        raise SetupError("give either --train-iters or --num-epochs")
    if args.optimizer == "sgd" and "use_distributed_optimizer" in args.derived:
        # Megatron's distributed optimizer keeps the state of Adam, not that of torch's SGD.
        args.use_distributed_optimizer = args.dist_ckpt_optim_fully_reshardable = False
    _complete_save_flags(args)
    # What lies in the output folder moves with it: config.yaml does not name these.
    args.in_output_dir = []
    _fill(args, "save", os.path.join(args.output_dir, "checkpoints"))
    if not args.eval_only:
        _fill(args, "tensorboard_dir", os.path.join(args.output_dir, "tensorboard"))
    if args.mlflow_experiment and importlib.util.find_spec("mlflow") is None:
        raise SetupError("--mlflow-experiment: mlflow is not installed (pip install '.[mlflow]')")
    if args.wandb_project:
        _check_wandb()
        _fill(args, "wandb_exp_name", os.path.basename(os.path.normpath(args.output_dir)))
        _fill(args, "wandb_save_dir", args.output_dir)
    if device_type() == "cuda" and not (args.fp32 or args.fp16 or args.bf16):
        # Written to config.yaml as if it had been given: an export on a CPU keeps it.
        args.bf16 = True
    if args.fp32 and (args.fp16 or args.bf16):
        raise SetupError("--fp32 contradicts --fp16 and --bf16")
    if args.profile and not args.use_pytorch_profiler and device_type() != "cuda":
        raise SetupError("--profile: it is for nsys on CUDA; add --use-pytorch-profiler")
    if args.cross_entropy_loss_fusion and not args.bf16:
        raise SetupError(
            "--cross-entropy-loss-fusion rounds its gradients to bf16; add --bf16 or leave it out"
        )
    if args.model_backend == "transformers":
        args.max_position_embeddings = max(args.max_position_embeddings, args.seq_length)
    elif args.hf_config is not None:
        # Rotary positions are computed, not learned: the model's limit is advice, not a table size.
        args.max_position_embeddings = max(args.max_position_embeddings, args.seq_length)
        args.padded_vocab_size = sizes.padded_vocabulary(args.vocab_size, args)
    elif args.vocab_size and not args.padded_vocab_size:
        args.padded_vocab_size = sizes.padded_vocabulary(args.vocab_size, args)
    complete_recomputation(args)
    check_step_flags(args)
    if args.freeze is not None and getattr(args.hf_config, "vision_config", None) is None:
        model = f"--hf-model {args.hf_model}" if args.hf_model else "the model"
        raise SetupError(f"--freeze {args.freeze}: {model} has no part that sees; leave it out")
    hybrid.check_flags(args)  # before those who look for the parts that they change
    complete_expert_flags(args)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        # Megatron trains experts with tensor parallelism only this way.
        args.sequence_parallel = True
        args.derived.append("sequence_parallel")
    complete_distillation(args)
    args.lora = lora_of(args)
    if args.moe_grouped_gemm is None:
        targets = chosen_targets(args.hf_config, args.lora) if args.lora else {}
        of_experts = any(target.weight.of_expert for target in targets.values())
        args.moe_grouped_gemm = has_grouped_gemm() and not of_experts
    args.quantisation = quantisation_of(args)
    sizes.check(args)
    overlap = sizes.overlap(args)
    args.overlap_grad_reduce = overlap["overlap_grad_reduce"]
    args.overlap_param_gather = overlap["overlap_param_gather"]
    if args.global_batch_size is None:
        args.global_batch_size = sizes.batch_multiple(args)
    if args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False  # after the check, whose proposal may turn to a larger size


def keep_date(args: argparse.Namespace, day: str | None) -> None:
    """Set the day that a chat template's clock says, where nobody has given one.

    Before the data are prepared to that of the checkpoint, whose data go on, and after it to what the
    clock said, so that `config.yaml` runs the same again on another day.
    """
    if args.template_date is None:
        args.template_date = day


def complete_run(
    args: argparse.Namespace,
    *,
    load: str | None,
    ckpt_step: int | None,
    finetune: bool,
    by_modelopt: bool,
    begins_at: int = 0,
    train_iters: int | None = None,
    evaluates: bool = False,
) -> None:
    """Set what Megatron must see of a run; `config.yaml`, which says what was asked for, is written before.

    Args:
        args: as parsed, not validated yet.
        load: the folder to load from, if anything is loaded.
        ckpt_step: the checkpoint in it, whatever its tracker file names.
        finetune: only weights are taken from it.
        by_modelopt: it is of a model that ModelOpt converted.
        begins_at: consumed packs at which this data began, `args.data_begins_at` from here on.
        train_iters: steps to the end of the run; None where `--train-iters` has said it.
        evaluates: whether there is anything to evaluate. Each split has its own number of batches
            (`hooks.evaluation_iterations`); to Megatron `eval_iters` says only whether there are any.
    """
    args.load, args.ckpt_step, args.finetune = load, ckpt_step, finetune
    # Also of a model that is to be converted: its state is saved with every checkpoint.
    # And a teacher's states travel between stages as those of ModelOpt's do.
    args.modelopt_enabled = bool(
        by_modelopt or args.draft or args.quantisation or args.export_kd_teacher_load
    )
    args.data_begins_at = begins_at
    if train_iters is not None:
        args.train_iters = train_iters
    args.eval_iters = 1 if evaluates else 0
    # Megatron would remove, without looking, what comes before.
    args.retain_interval, args.save_retain_interval = args.save_retain_interval, None
    if args.hang_timeout is None:
        args.hang_timeout = args.distributed_timeout_minutes * 60.0
    if args.hang_timeout > 0:
        # The watchdog, which can tell what happened, comes before torch's own timeout of a collective.
        longest = (PATIENCE * args.hang_timeout + 120.0) / 60.0
        args.distributed_timeout_minutes = max(args.distributed_timeout_minutes, longest)


def complete_inference(
    args: argparse.Namespace,
    *,
    load: str | None = None,
    ckpt_step: int | None = None,
    lora: LoraSettings | None = None,
) -> None:
    """Set what Megatron must see where one process only reads a model.

    Args:
        args: as parsed, not validated yet.
        load: the folder to load from, if a checkpoint is loaded.
        ckpt_step: the checkpoint in it, whatever its tracker file names.
        lora: the adapter that it holds, if it holds one in the place of a model.
    """
    args.load, args.ckpt_step, args.save = load, ckpt_step, None
    args.lora = lora
    args.tensorboard_dir = None
    args.no_load_optim = args.no_load_rng = True
    args.exit_signal_handler = False
    args.use_distributed_optimizer = False


def validate(args: argparse.Namespace) -> None:
    """Let Megatron check the arguments and derive what it derives; from here on they stay as they are.

    New are `fsdp_compute_dtype`, and `stop_at_nonfinite` in the place of Megatron's
    `check_for_nan_in_loss_and_grad`.

    Raises:
        SetupError: Megatron refuses them.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    untied = args.untie_embeddings_and_output_weights
    # Megatron refuses tied embeddings with FSDP2, for its own wrapper's sake.
    args.untie_embeddings_and_output_weights = untied or args.use_torch_fsdp2
    try:
        validate_args(args)
        gpt_config_from_args(args)  # the model's own checks
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error) or failed_condition(error, args)
        raise SetupError(f"Megatron refuses these flags: {reason}") from error
    args.untie_embeddings_and_output_weights = untied
    # Mixed precision is left to FSDP2: shards, gradients and optimizer in fp32, computation in bf16.
    # Megatron would turn the whole model into bf16, keep fp32 copies in the optimizer and the sum of
    # gradients over micro batches in bf16, eight bits of it. Without training it wraps nothing.
    args.fsdp_compute_dtype = None
    if args.use_torch_fsdp2 and not args.skip_train and args.bf16:
        args.fsdp_compute_dtype = torch.bfloat16
        args.bf16, args.params_dtype = False, torch.float32
    # Off by flag, and with fp16's dynamic loss scaling, which skips such steps.
    args.stop_at_nonfinite = args.check_for_nan_in_loss_and_grad
    args.check_for_nan_in_loss_and_grad = False
    if device_type() == "cpu":
        # Megatron has insisted on it; `platform/checkpoints/writer_queue.py` says why it is not wanted.
        args.use_persistent_ckpt_worker = False


def _fill(args: argparse.Namespace, name: str, value: str) -> None:
    """Set an argument that nobody gave, and remember that it follows from the output folder."""
    if not getattr(args, name):
        setattr(args, name, value)
        args.in_output_dir.append(name)


def _prepare_evaluation(args: argparse.Namespace) -> None:
    """Set what follows from `--eval-only`; Megatron's `--skip-train` does the rest.

    With it Megatron builds neither optimizer nor gradient buffers and loads only weights.

    Raises:
        SetupError: a flag asks for what only training can give.
    """
    if args.eval_at_start:
        raise SetupError("--eval-at-start: --eval-only evaluates, and there is no step after it")
    if args.save_hf:
        raise SetupError("--save-hf: --eval-only changes no model; use scripts/export_hf.py")
    args.train_iters = 0
    args.num_epochs = None
    # Megatron asks for a number; 0 leaves the learning rate schedule out.
    args.no_load_optim = args.no_load_rng = True
    # Messages of gradients and of an optimizer that there is not, which overlap with nothing.
    args.overlap_grad_reduce = args.overlap_param_gather = False
    args.overlap_param_gather_with_optimizer_step = False


def _complete_save_flags(args: argparse.Namespace) -> None:
    """Check the flags about saving, and set what `--async-save` needs.

    Raises:
        SetupError: a flag that cannot work here.
    """
    if args.keep_checkpoints is not None and args.keep_checkpoints < 1:
        raise SetupError(f"--keep-checkpoints {args.keep_checkpoints}: must be at least 1")
    if args.non_persistent_save_interval:
        raise SetupError(
            "--non-persistent-save-interval: such checkpoints are not resumed from; use --save-interval "
            "with --keep-checkpoints"
        )
    for name in ("async_save", "verify_integrity") if args.use_torch_fsdp2 else ():
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise SetupError(f"{flag}: not with --use-torch-fsdp2; leave one of them out")
    if not args.async_save:
        return
    if device_type() == "cpu" and args.use_persistent_ckpt_worker:
        raise SetupError(
            "--use-persistent-ckpt-worker: on a CPU such a worker would write tensors that training goes "
            "on changing; leave it out, --async-save forks a process for each save"
        )
    args.use_persistent_ckpt_worker = True  # Megatron drops --async-save without it
    args.derived.append("use_persistent_ckpt_worker")


def _check_wandb() -> None:
    """Look for the package and for credentials; nothing is sent.

    Raises:
        SetupError: wandb is not installed, or is to log online and has no API key.
    """
    if importlib.util.find_spec("wandb") is None:
        raise SetupError("--wandb-project: wandb is not installed (pip install '.[wandb]')")
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return  # the same credentials; importing wandb takes a second
    import wandb
    from wandb.errors import UsageError

    settings = wandb.setup().settings
    if settings.mode != "online":
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except UsageError:
        known = False
    if not known:
        raise SetupError(
            "--wandb-project: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or log to files "
            "only with WANDB_MODE=offline"
        )
