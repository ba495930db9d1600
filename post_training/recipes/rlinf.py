"""RLinf's SFT files, such as `custom_sft_vlm.yaml` (https://github.com/RLinf/RLinf at a3816b59).

Names and defaults are those of `SFTRunner`, `FSDPSftWorker`, `FSDPModelManager` and
`hybrid_engines/fsdp.yaml` there; `docs/recipes.md` explains the table.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from post_training.recipes.aliases import (
    Meaning,
    Refused,
    Rule,
    System,
    Unused,
    Values,
    checkpoint_to_load,
    evaluation_batch,
    precision,
)

_MODEL, _OPTIM, _FSDP = "actor.model", "actor.optim", "actor.fsdp_config"
_MIXED, _AMP = f"{_FSDP}.mixed_precision", f"{_FSDP}.amp_autocast"


def _evaluates_only(values: Values) -> bool:
    return values.get("data.train_data_paths") is None


def _epochs(value: Any, values: Values) -> Meaning:
    """Passes over the data, where the file means these; it ends there with whatever is reached first."""
    epochs, steps = values.whole("runner.max_epochs", -1), values.whole("runner.max_steps", -1)
    if _evaluates_only(values) or not {"train_iters", "num_epochs"}.isdisjoint(values.given):
        return {}
    if epochs <= 0:
        return {} if steps >= 0 else {"num_epochs": 1}
    if steps >= 0:
        return Refused(
            f"and max_steps {steps}: give --num-epochs {epochs} or --train-iters {steps}"
        )
    if values.whole(f"{_OPTIM}.total_training_steps", -1) == epochs:
        return Refused(
            f"optim.total_training_steps is the same number, so that {epochs} may mean passes over the "
            f"data or steps: give --num-epochs {epochs} or --train-iters {epochs}"
        )
    return {"num_epochs": epochs}


def _steps(value: Any, values: Values) -> Meaning:
    steps = values.whole("runner.max_steps", -1)
    return {} if steps < 0 or _evaluates_only(values) else {"train_iters": steps}


def _decay(value: Any, values: Values) -> Meaning:
    steps = values.whole(f"{_OPTIM}.total_training_steps", -1)
    ends = {values.whole(f"runner.{name}", -1) for name in ("max_steps", "max_epochs")}
    return {} if steps <= 0 or steps in ends else {"lr_decay_iters": steps}


def _warm_up(value: Any, values: Values) -> Meaning:
    steps = values.whole(f"{_OPTIM}.lr_warmup_steps", -1)
    if steps >= 0:
        return {"lr_warmup_iters": steps} if steps else {}
    share = values.get(f"{_OPTIM}.lr_warmup_steps_ratio")
    return {"lr_warmup_fraction": share} if share else {}


def _output(value: Any, values: Values) -> Meaning:
    """The folder that RLinf's checkpoints lie in: its log path, and there the experiment's name."""
    folder = values.get("runner.logger.log_path") or values.get("runner.output_dir")
    name = values.get("runner.logger.experiment_name") or values.get("runner.experiment_name") or ""
    return {"output_dir": str(PurePath(folder, str(name)))} if folder else {}


def _trackers(value: Any, values: Values) -> Meaning:
    names = [value] if isinstance(value, str) else value or []
    if set(names) - {"tensorboard", "wandb"}:
        return Refused("logs go to TensorBoard, metrics.jsonl and wandb; name one of these")
    if "wandb" not in names:
        return {}  # TensorBoard is written always
    project = values.get("runner.logger.project_name")
    return {"wandb_project": project} if project else Refused("wandb needs logger.project_name")


def _project(value: Any, values: Values) -> Meaning:
    if "wandb" in (values.get("runner.logger.logger_backends") or ()):
        return {"wandb_project": value}
    return Unused("logger_backends names no wandb")


def _train_data(value: Any, values: Values) -> Meaning:
    return {"eval_only": True} if value is None else {"finetune_data_files": value}


def _evaluation(value: Any, values: Values) -> Meaning:
    batch, micro = values.get("actor.global_batch_size"), values.whole("actor.micro_batch_size")
    return evaluation_batch("actor.eval_batch_size", batch, micro, values)


def _lora(value: Any, values: Values) -> Meaning:
    if not values.get(f"{_MODEL}.is_lora"):
        return {} if isinstance(value, bool) else Unused("is_lora is false")
    rank = values.whole(f"{_MODEL}.lora_rank", 32)
    return {"lora_rank": rank, "lora_alpha": rank}


_PRECISION = precision(f"{_MIXED}.param_dtype", f"{_MODEL}.precision")
_OFF: dict[Any, Meaning] = {
    False: {},
    True: Refused("weights stay on their devices; shard over more processes"),
}
_KERNELS = Unused("the machine decides which kernels compute")


def _computed(value: Any, values: Values) -> Meaning:
    """What `precision`, `param_dtype` and autocast say together: what is computed in; shards are fp32."""
    named = None if isinstance(value, bool) else value
    if values.get(f"{_AMP}.enabled"):
        return precision(f"{_AMP}.precision")(named, Values({f"{_AMP}.precision": "bf16"} | values))
    return _PRECISION(named, values)


def _buffers(value: Any, values: Values) -> Meaning:
    named = precision("")(value, values)
    return named if isinstance(named, Refused) else Unused("buffers keep fp32, which is no less")


_RENDERED: dict[Any, Meaning] = {
    True: {},
    False: Refused("rows are rendered by a chat template; --chat-template names one"),
}
_SHARDING: dict[Any, Meaning] = {
    "full_shard": {"fsdp_sharding": "full"},
    "no_shard": {"fsdp_sharding": "none"},
    "shard_grad_op": Refused("use full_shard, which takes less memory, or no_shard"),
    "hybrid_shard": Refused("shards are spread over all processes; use full_shard or no_shard"),
}
_RULES: dict[str, Rule] = {
    "hydra": Unused("it is of Hydra's process"),
    **dict.fromkeys(
        ("algorithm", "reward", "critic", "rollout", "env"), Unused("it is of other tasks than sft")
    ),
    "cluster": Unused("the launcher says where processes run"),
    "runner.task_type": {"sft": {}},
    "runner.max_epochs": _epochs,
    "runner.max_steps": _steps,
    "runner.val_check_interval": "eval_interval",
    "runner.save_interval": "save_interval",
    "runner.output_dir": _output,
    "runner.experiment_name": _output,
    "runner.logger.log_path": _output,
    "runner.logger.experiment_name": _output,
    "runner.logger.project_name": _project,
    "runner.logger.logger_backends": _trackers,
    "runner.resume_dir": checkpoint_to_load,
    "runner.early_stop": Refused("use --early-stop-metric and --early-stop-patience"),
    "data.type": Unused("rows say what they hold"),
    "data.dataset_name": Unused("rows say what they hold"),
    "data.train_data_paths": _train_data,
    "data.val_data_paths": "valid_data_files",
    "data.eval_data_paths": "valid_data_files",
    "data.prompt_key": "prompt_key",
    "data.choice_key": "choice_key",
    "data.answer_key": "answer_key",
    "data.image_keys": "image_keys",
    "data.max_prompt_length": "max_prompt_length",
    "data.apply_chat_template": _RENDERED,
    "data.use_chat_template": _RENDERED,
    "data.lazy_loading": Unused("pictures are always read when they are needed"),
    "data.num_workers": Unused("threads decode the next pack while this one is computed"),
    "actor.group_name": Unused("it is of RLinf's processes"),
    "actor.training_backend": {
        **dict.fromkeys(
            ("fsdp", "fsdp2"), {"model_backend": "transformers", "use_torch_fsdp2": True}
        ),
        "megatron": Refused("use fsdp: these models are computed by their class of transformers"),
    },
    "actor.micro_batch_size": "micro_batch_size",
    "actor.eval_batch_size": _evaluation,
    "actor.global_batch_size": "global_batch_size",
    "actor.seed": "seed",
    "actor.enable_offload": _OFF,
    f"{_MODEL}.model_type": Unused("config.json of model_path says it"),
    f"{_MODEL}.model_path": "hf_model",
    f"{_MODEL}.precision": _computed,
    f"{_MODEL}.is_lora": _lora,
    f"{_MODEL}.lora_rank": _lora,
    f"{_MODEL}.lora_path": "lora_adapter",
    f"{_MODEL}.trust_remote_code": "trust_remote_code",
    f"{_MODEL}.attn_implementation": _KERNELS,
    "actor.tokenizer.tokenizer_model": "hf_tokenizer",
    "actor.tokenizer.trust_remote_code": "trust_remote_code",
    "actor.tokenizer": Unused("the tokenizer's own files say it"),
    f"{_OPTIM}.lr": "lr",
    f"{_OPTIM}.min_lr": "min_lr",
    f"{_OPTIM}.adam_beta1": "adam_beta1",
    f"{_OPTIM}.adam_beta2": "adam_beta2",
    f"{_OPTIM}.adam_eps": "adam_eps",
    f"{_OPTIM}.weight_decay": "weight_decay",
    f"{_OPTIM}.clip_grad": "clip_grad",
    f"{_OPTIM}.lr_scheduler": {
        "cosine": {"lr_decay_style": "cosine"},
        "constant": {"lr_decay_style": "constant"},
    },
    f"{_OPTIM}.total_training_steps": _decay,
    f"{_OPTIM}.lr_warmup_steps": _warm_up,
    f"{_OPTIM}.lr_warmup_steps_ratio": _warm_up,
    f"{_FSDP}.strategy": dict.fromkeys(("fsdp", "fsdp2"), Unused("both are FSDP2 here")),
    f"{_FSDP}.sharding_strategy": _SHARDING,
    f"{_FSDP}.use_orig_params": Unused("FSDP2 has no other parameters"),
    f"{_FSDP}.gradient_checkpointing": {True: {"recompute_granularity": "full"}, False: {}},
    f"{_MIXED}.param_dtype": _computed,
    f"{_MIXED}.reduce_dtype": Unused("gradients are summed in fp32"),
    f"{_MIXED}.buffer_dtype": _buffers,
    f"{_AMP}.enabled": _computed,
    f"{_AMP}.precision": _computed,
    f"{_FSDP}.grad_scaler": Unused("--fp16 has one"),
    f"{_FSDP}.cpu_offload": _OFF,
    f"{_FSDP}.use_liger_kernel": _KERNELS,
    **{
        f"{_FSDP}.{name}": Unused("FSDP2 decides when weights are gathered")
        for name in "reshard_after_forward forward_prefetch backward_prefetch limit_all_gathers "
        "enable_gradient_accumulation offload_pin_memory".split()
    },
}

RLINF = System(
    "RLinf",
    "actor",
    _RULES,
    {
        "runner.max_epochs": -1,
        f"{_OPTIM}.lr_scheduler": "constant",
        f"{_OPTIM}.adam_beta2": 0.999,
        f"{_OPTIM}.weight_decay": 0.01,
    },
)
