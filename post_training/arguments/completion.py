"""What follows from the flags that were given: the one place that completes `args` once they are parsed."""

from __future__ import annotations

import argparse
import importlib.util
import os

from post_training.arguments.experts import complete_expert_flags
from post_training.arguments.schedule import check_recomputation, check_step_flags
from post_training.errors import SetupError
from post_training.hf.config import sliding_window
from post_training.layout import sizes
from post_training.machine.device import device_type, warn_once


def complete(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags, and check what can be checked before the data are known.

    Raises:
        SetupError: a missing or contradictory flag, a layout that cannot work.
    """
    if not args.output_dir:
        raise SetupError("--output-dir is missing: name a folder for checkpoints, metrics and logs")
    if args.hf_model is None and args.num_layers is None:
        raise SetupError(
            "--hf-model is missing: name a HuggingFace folder or hub name "
            "(or describe a model with --num-layers, --hidden-size and so on)"
        )
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
    if args.train_samples:
        raise SetupError("--train-samples: use --train-iters or --num-epochs")
    if not args.skip_train and bool(args.train_iters) == bool(args.num_epochs):
        raise SetupError("give either --train-iters or --num-epochs")
    if args.optimizer == "sgd" and "use_distributed_optimizer" in args.derived:
        # Megatron's distributed optimizer keeps the state of Adam, not that of torch's SGD.
        args.use_distributed_optimizer = args.dist_ckpt_optim_fully_reshardable = False
    args.data_begins_at = 0  # see resume.DataPosition
    _complete_save_flags(args)
    # What lies in the output folder moves with it: config.yaml does not name these.
    args.in_output_dir = []
    _fill(args, "save", os.path.join(args.output_dir, "checkpoints"))
    if not args.eval_only:
        _fill(args, "tensorboard_dir", os.path.join(args.output_dir, "tensorboard"))
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
    if args.hf_config is not None:
        window = sliding_window(args.hf_config)
        if window is not None and args.seq_length > window:
            raise SetupError(
                f"--seq-length {args.seq_length}: the model attends to {window} tokens only (sliding "
                f"window), which is not supported; use --seq-length {window} or less"
            )
        # Rotary positions are computed, not learned: the model's limit is advice, not a table size.
        if args.seq_length > args.max_position_embeddings and not args.skip_train:
            warn_once(
                f"--seq-length {args.seq_length}: the model was made for {args.max_position_embeddings} "
                f"tokens (max_position_embeddings of config.json); longer documents are trained all the "
                f"same, and the exported config.json says {args.seq_length}"
            )
        args.max_position_embeddings = max(args.max_position_embeddings, args.seq_length)
        args.padded_vocab_size = sizes.padded_vocabulary(args.vocab_size, args)
    elif args.vocab_size and not args.padded_vocab_size:
        args.padded_vocab_size = sizes.padded_vocabulary(args.vocab_size, args)
    check_recomputation(args)
    check_step_flags(args)
    complete_expert_flags(args)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        # Megatron trains experts with tensor parallelism only this way.
        args.sequence_parallel = True
        args.derived.append("sequence_parallel")
    sizes.check(args)
    if args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False  # after the check, whose proposal may turn to a larger size


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
