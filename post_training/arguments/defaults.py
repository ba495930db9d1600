"""Where a finetuning run wants other defaults than Megatron's pretraining: by task, machine and layout."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from post_training.machine.device import device_type


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
        # As in transformers: off unless it is asked for (`post_training/arguments/completion.py`).
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": None,
        # Training on with more steps stretches the schedule, which a checkpoint would fix otherwise.
        "override_opt_param_scheduler": True,
        "num_workers": 0,
    }


def platform_defaults(transformer_engine: bool) -> dict[str, Any]:
    """Flags that follow from the machine.

    Args:
        transformer_engine: whether the layers are those of Transformer Engine.
    """
    on_cuda = device_type() == "cuda"
    flags: dict[str, Any] = {
        "distributed_backend": "nccl" if on_cuda else "gloo",
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        # The output layer is Megatron's own in either case, and takes its kernel from Apex only.
        "gradient_accumulation_fusion": transformer_engine
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }
    if not transformer_engine:
        flags |= {
            # Kernels of Transformer Engine and Apex.
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "no_persist_layer_norm": True,
        }
    if on_cuda:
        # Where there is data parallelism: completion.py.
        flags |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    else:
        # Fused by torch.compile, which a CPU run does without.
        flags |= {
            "bias_swiglu_fusion": False,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
        }
    return flags


def fsdp2_defaults() -> dict[str, Any]:
    """Where `--use-torch-fsdp2` wants another default than other layouts."""
    flags: dict[str, Any] = {
        # FSDP2 shards the optimizer itself.
        "use_distributed_optimizer": False,
        "dist_ckpt_optim_fully_reshardable": False,
        "gradient_accumulation_fusion": False,
        "ckpt_format": "torch_dcp",
        # And gathers and reduces ahead by itself.
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }
    if device_type() == "cuda":
        # Built on the host and sharded from there: no device ever holds the whole model.
        flags["use_cpu_initialization"] = True
    return flags
