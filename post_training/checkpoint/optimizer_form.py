"""The form of an optimizer's state in a checkpoint: only a run with the same form goes on with it.

Every other flag of the optimizer and its schedule is the run's own from its first step on, whatever the
checkpoint was saved with (`platform/checkpoints/optimizer_state.py`);
`tests/runs/test_optimizer_flags.py` walks them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from post_training.checkpoint.store import Checkpoint
from post_training.errors import SetupError

# Which tensors and settings there are follows from these as they are.
_AS_GIVEN = (
    *("optimizer", "use_distributed_optimizer", "use_precision_aware_optimizer"),
    *("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_cuda_graph"),
    *("optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
)


def optimizer_form(args: argparse.Namespace) -> dict[str, str]:
    """What must be the same in a run that goes on; what has no bearing on this run is left out.

    Args:
        args: resolved arguments, before Megatron's validation.

    Returns:
        Values by flag, as a message says them.
    """
    form = {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in _AS_GIVEN}
    if args.optimizer == "sgd":
        form["--sgd-momentum"] = "above 0" if args.sgd_momentum else "0"
    if args.fp16 and not args.loss_scale:
        # The loss scale goes on; where it began is past.
        form["--initial-loss-scale"] = str(float(args.initial_loss_scale))
    if args.use_torch_fsdp2:
        # Parameters are numbered there, group by group.
        split = args.apply_wd_to_qk_layernorm or args.no_weight_decay_cond_type is not None
        form["--apply-wd-to-qk-layernorm"] = str(split)
        form["--decoupled-lr"] = "not given" if args.decoupled_lr is None else "given"
    elif not args.use_distributed_optimizer:
        form["precision"] = "bf16 or fp16" if args.bf16 or args.fp16 else "fp32"
    return form


def check_optimizer(
    args: argparse.Namespace, checkpoint: Checkpoint, written: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint whose optimizer this run cannot go on with.

    Args:
        args: resolved arguments.
        checkpoint: what is to be loaded.
        written: what it says of its origin; of an older version `config.yaml`, without a form.

    Raises:
        SetupError: it holds no optimizer, or one of another form, and this run asks for it.
    """
    if args.no_load_optim or args.skip_train:
        return
    if written.get("no_save_optim"):
        raise SetupError(
            f"{checkpoint.path} holds no optimizer state (it was saved with --no-save-optim): add "
            f"--no-load-optim to go on with a new optimizer, or choose another --output-dir"
        )
    before = {"--optimizer": written.get("optimizer", args.optimizer)}
    before |= written.get("optimizer_form", {})
    for flag, now in optimizer_form(args).items():
        if before.get(flag, now) != now:
            raise SetupError(
                f"{checkpoint.path} holds the optimizer's state of {flag} {before[flag]}, this "
                f"run's is {now}: give the same, or --no-load-optim to go on with a new optimizer"
            )
