"""What `--use-torch-fsdp2` does not go with."""

from __future__ import annotations

import argparse
import os

from post_training.errors import SetupError
from post_training.machine import environment
from post_training.machine.device import device_type


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse parallel sizes that FSDP2 does not go with; context parallelism is left.

    Raises:
        SetupError: naming the size.
    """
    if not args.use_torch_fsdp2:
        return
    for flag, what in (
        ("tensor_model_parallel_size", "every matrix"),
        ("pipeline_model_parallel_size", "the layers"),
        ("expert_model_parallel_size", "the experts"),
        ("expert_tensor_parallel_size", "every expert"),
    ):
        size = getattr(args, flag)
        if size is not None and size > 1:
            raise SetupError(
                f"--use-torch-fsdp2 with --{flag.replace('_', '-')} {size}: FSDP2 cuts {what} over all "
                f"{args.world_size} processes by itself; leave one of the two flags out"
            )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse other flags that FSDP2 does not go with.

    Raises:
        SetupError: naming the flag.
    """
    if not args.use_torch_fsdp2:
        if args.fsdp_sharding != "full":
            raise SetupError(
                f"--fsdp-sharding {args.fsdp_sharding} is for --use-torch-fsdp2; leave it out"
            )
        return
    if args.use_distributed_optimizer:
        raise SetupError(
            "--use-torch-fsdp2 with --use-distributed-optimizer: FSDP2 shards the optimizer itself; leave "
            "--use-distributed-optimizer out"
        )
    for flag in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(args, flag):
            raise SetupError(
                f"--use-torch-fsdp2 with --{flag.replace('_', '-')}: FSDP2 overlaps its messages by "
                f"itself; leave it out"
            )
    if args.fp16:
        raise SetupError("--use-torch-fsdp2 with --fp16: use --bf16 or --fp32")
    if args.ckpt_format != "torch_dcp":
        raise SetupError(
            f"--use-torch-fsdp2 with --ckpt-format {args.ckpt_format}: its checkpoints are torch_dcp; "
            f"leave --ckpt-format out"
        )
    if os.environ.get(environment.NAME) == "1":
        if device_type() == "cuda":
            raise SetupError(
                f"--use-torch-fsdp2: {environment.NAME} is 1 in the environment, FSDP2 needs several "
                f"connections; unset it"
            )
        # Nothing reads it without CUDA but Megatron's own check.
        del os.environ[environment.NAME]
