"""Command line, `--config` file and HuggingFace model folder, resolved into one Megatron namespace.

Megatron's own parser is the source of truth: this module adds flags to it and sets defaults in it.
What a user writes wins over what is derived; what contradicts the model is refused.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from data.arguments import add_data_arguments
from post_training import layout
from post_training.config_file import apply_config_file, apply_settings
from post_training.errors import SetupError, failed_condition
from post_training.eval_only import prepare_evaluation
from post_training.expert_flags import complete_expert_flags
from post_training.fsdp_layout import fsdp2_defaults
from post_training.hf_config import load_hf_config, megatron_flags, sliding_window
from post_training.machine_flags import (
    has_grouped_gemm,
    has_packed_kernel,
    has_transformer_engine,
    platform_defaults,
)
from post_training.megatron_flags import REFUSED, MegatronFlags
from post_training.platform import device_type
from post_training.saving import complete_save_flags
from post_training.schedule_flags import check_schedule_flags
from post_training.step_flags import check_step_flags
from post_training.wandb_login import check_wandb


def add_finetune_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser."""
    group = parser.add_argument_group("supervised finetuning")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="flags from a file; the command line wins"
    )
    group.add_argument(
        "--output-dir", metavar="DIR", help="where everything of this run is written"
    )
    group.add_argument(
        "--hf-model",
        metavar="PATH_OR_NAME",
        help="HuggingFace folder or hub name: architecture, tokenizer and weights come from it",
    )
    group.add_argument(
        "--hf-tokenizer",
        metavar="PATH_OR_NAME",
        help="another tokenizer than the model's (or the only one, with Megatron flags)",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="take only architecture and tokenizer from --hf-model and start from random weights",
    )
    group.add_argument(
        "--num-epochs",
        type=int,
        metavar="N",
        help="train for N passes over the data instead of --train-iters",
    )
    group.add_argument(
        "--save-hf",
        action="store_true",
        help="write OUTPUT_DIR/hf, a HuggingFace folder, when training ends",
    )
    group.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the validation and test data and leave: no training, no optimizer",
    )
    group.add_argument(
        "--isolation-check",
        action="store_true",
        default=True,
        help="before the first step, see that a changed document moves no other's loss (default)",
    )
    group.add_argument(
        "--no-isolation-check", dest="isolation_check", action="store_false", help="do not look"
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="end the job when a rank makes no progress for so long, six times as long in set-up, the "
        "first step and saving (default: --distributed-timeout-minutes; 0: never)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="keep the newest N complete checkpoints and remove older ones (default: keep all)",
    )
    group.add_argument(
        "--restart-data",
        action="store_true",
        help="where the checkpoint was saved in other data: keep its weights, optimizer and step, and "
        "begin this data at its beginning",
    )
    group.add_argument("--fp32", action="store_true", help="train in fp32 on a GPU (default: bf16)")
    group.add_argument(
        "--no-progress", action="store_true", help="no progress bar, a line every --log-interval"
    )
    add_data_arguments(parser)
    return parser


def sft_defaults() -> dict[str, Any]:
    """Where finetuning wants another default than Megatron's pretraining."""
    return {
        "micro_batch_size": 1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
        "cp_comm_type": ["all_gather"],
        "use_distributed_optimizer": True,
        # Lets a checkpoint be resumed with another number of processes on any axis.
        "dist_ckpt_optim_fully_reshardable": True,
        "dataloader_type": "external",
        "ckpt_format": "torch_dist",
        "async_strategy": "mcore",
        "exit_signal_handler": True,
        "log_interval": 1,
        "tensorboard_log_interval": 1,
        "save_interval": 500,
        "eval_interval": 500,
        # None: the whole split.
        "eval_iters": None,
        "lr": 1e-5,
        "lr_decay_style": "cosine",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "seq_length": 2048,
        "rerun_mode": "disabled",
        # Each token travels to the ranks of its experts only, not to all.
        "moe_token_dispatcher_type": "alltoall",
        # As in transformers: off unless it is asked for (`post_training/expert_flags.py`).
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": None,
        # Training on with more steps stretches the schedule, which a checkpoint would fix otherwise.
        "override_opt_param_scheduler": True,
        "num_workers": 0,
    }


def parse_arguments(
    argv: Sequence[str] | None = None, *, settings: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Resolve and check all arguments; no process group is needed and none is started.

    Args:
        argv: the command line without the program's name; `sys.argv[1:]` by default.
        settings: in the place of a `--config` file, what one would say.

    Returns:
        The namespace that goes into Megatron's `validate_args`. Besides Megatron's own names it holds
        this project's flags, `hf_config` (or None) and `derived` (flags that nobody wrote).

    Raises:
        SetupError: an unknown key, a missing or contradictory flag, a layout that cannot work.
    """
    from megatron.training.arguments import parse_args

    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--hf-model")
    early.add_argument("--transformer-impl")
    early.add_argument("--fp32", action="store_true")
    early.add_argument("--trust-remote-code", action="store_true")
    early.add_argument("--use-torch-fsdp2", action="store_true")
    early.add_argument("--yaml-cfg")
    known, _ = early.parse_known_args(argv)

    derived: dict[str, Any] = {}
    hf_config: Any = None
    megatron: MegatronFlags
    architecture: dict[str, Any] = {}

    def prepare(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        nonlocal hf_config, megatron
        megatron = MegatronFlags(parser)
        add_finetune_arguments(parser)
        for action in parser._actions:
            # One of Megatron's help texts has a bare percent sign, on which argparse stumbles.
            if action.dest == "moe_paged_stash_buffer_size_factor_cuda" and action.help:
                action.help = action.help.replace("%)", "%%)").replace("%%%)", "%%)")
        setattr(parser, "error", functools.partial(_refuse, parser))  # noqa: B010
        if settings is not None:
            written = apply_settings(parser, settings, "settings")
        else:
            written = apply_config_file(parser, known.config) if known.config else {}
        if known.yaml_cfg or written.get("yaml_cfg"):
            # Megatron would read it in the place of all flags.
            raise SetupError(f"--yaml-cfg is not supported: {REFUSED['yaml_cfg']}")
        name = known.hf_model or written.get("hf_model")
        transformer_impl = known.transformer_impl or written.get("transformer_impl")
        use_te = has_transformer_engine()
        if transformer_impl == "transformer_engine" and not use_te:
            raise SetupError(
                "--transformer-impl transformer_engine: Transformer Engine needs a CUDA device and "
                "its package (pip install '.[te]'); leave the flag out to use the local attention"
            )
        if use_te and transformer_impl is None:
            use_te = has_packed_kernel(fp32=known.fp32 or bool(written.get("fp32")))
        derived.update(sft_defaults())
        derived.update(platform_defaults(use_te and transformer_impl != "local"))
        if known.use_torch_fsdp2 or written.get("use_torch_fsdp2"):
            derived.update(fsdp2_defaults())
        if name:
            trust = known.trust_remote_code or bool(written.get("trust_remote_code"))
            hf_config = load_hf_config(name, trust_remote_code=trust)
            architecture.update(megatron_flags(hf_config))
            derived.update(architecture)
            if derived["transformer_impl"] == "transformer_engine" and "num_experts" in derived:
                derived["moe_grouped_gemm"] = has_grouped_gemm()
        unknown = derived.keys() - {action.dest for action in parser._actions}
        assert not unknown, f"not flags of this Megatron: {sorted(unknown)}"
        parser.set_defaults(**{key: v for key, v in derived.items() if key not in written})
        return parser

    previous = sys.argv
    sys.argv = [previous[0], *argv]
    try:
        args = parse_args(prepare)
    finally:
        sys.argv = previous

    megatron.check(args, derived, architecture)
    args.derived = sorted(key for key, value in derived.items() if getattr(args, key) == value)
    args.hf_config = hf_config
    _complete(args)
    layout.check(args)
    if args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False  # after the check, whose proposal may turn to a larger size
    return args


def validate(args: argparse.Namespace) -> None:
    """Let Megatron check the arguments and derive what it derives.

    Raises:
        SetupError: Megatron refuses them.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    from post_training.fsdp import keep_fp32_shards

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
    keep_fp32_shards(args)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Say in one line what argparse would say below hundreds of lines of usage."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        raise SetupError(message.removeprefix("argument "))
    flag = unknown.split()[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag.partition("=")[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else " (finetune.py --help lists all)"
    raise SetupError(f"{flag}: no such flag{hint}")


def _complete(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags."""
    if not args.output_dir:
        raise SetupError("--output-dir is missing: name a folder for checkpoints, metrics and logs")
    if args.hf_model is None and args.num_layers is None:
        raise SetupError(
            "--hf-model is missing: name a HuggingFace folder or hub name "
            "(or describe a model with --num-layers, --hidden-size and so on)"
        )
    args.eval_only = args.skip_train = args.eval_only or args.skip_train
    if args.eval_only:
        prepare_evaluation(args)
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
    args.data_begins_at = 0  # see position.DataPosition
    complete_save_flags(args)
    # What lies in the output folder moves with it: config.yaml does not name these.
    args.in_output_dir = []
    _fill(args, "save", os.path.join(args.output_dir, "checkpoints"))
    if not args.eval_only:
        _fill(args, "tensorboard_dir", os.path.join(args.output_dir, "tensorboard"))
    if args.wandb_project:
        check_wandb()
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
        args.max_position_embeddings = max(args.max_position_embeddings, args.seq_length)
        args.padded_vocab_size = layout.padded_vocabulary(args.vocab_size, args)
    elif args.vocab_size and not args.padded_vocab_size:
        args.padded_vocab_size = layout.padded_vocabulary(args.vocab_size, args)
    check_schedule_flags(args)
    check_step_flags(args)
    complete_expert_flags(args)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        # Megatron trains experts with tensor parallelism only this way.
        args.sequence_parallel = True
        args.derived.append("sequence_parallel")


def _fill(args: argparse.Namespace, name: str, value: str) -> None:
    """Set an argument that nobody gave, and remember that it follows from the output folder."""
    if not getattr(args, name):
        setattr(args, name, value)
        args.in_output_dir.append(name)
