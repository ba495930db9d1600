"""ROLL's `sft_config.yaml` (https://github.com/alibaba/ROLL at 8eb27cc2): what each key means here.

Names and defaults are those of `SFTConfig`, `WorkerConfig`, `TrainingArguments`, `ModelArguments` and
`DataArguments` there; `docs/recipes.md` explains the table.
"""

from __future__ import annotations

import ast
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
    processes,
)

_MODEL, _TRAINING = "sft_train.model_args", "sft_train.training_args"
_DATA, _STRATEGY = "sft_train.data_args", "sft_train.strategy_args.strategy_config"


def devices_of(value: Any) -> int | None:
    """How many devices `list(range(0,8))`, a list or a sum of both names; None for anything else."""

    def listed(node: ast.expr) -> list[Any]:
        match node:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [ast.literal_eval(element) for element in elements]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return listed(left) + listed(right)
            case ast.Call(func=ast.Name(id="list"), args=[inner]):
                return listed(inner)
            case ast.Call(func=ast.Name(id="range"), args=bounds):
                numbers = range(*(ast.literal_eval(bound) for bound in bounds))
                if len(numbers) < 2**20:
                    return list(numbers)
        raise ValueError

    try:
        found = listed(ast.parse(str(value).strip(), mode="eval").body)
        return len(found) if len(set(found)) == len(found) else None
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        return None


def _batch(value: Any, values: Values) -> Meaning:
    """The packs of a step, on as many processes as the file names, however many there are now."""
    mapping = values.get("sft_train.device_mapping")
    devices = processes() if mapping is None else devices_of(mapping)
    if devices is None:
        return Refused("is no list of devices, such as list(range(0,8))")
    parts = values.whole(f"{_MODEL}.ulysses_size")
    for axis in ("tensor_model", "pipeline_model", "context"):
        parts *= values.whole(f"{_STRATEGY}.{axis}_parallel_size")
    if parts < 1 or devices % parts or not devices:
        return Refused(f"{devices} devices cannot be shared out to parallel groups of {parts}")
    micro = values.whole(f"{_TRAINING}.per_device_train_batch_size")
    steps = values.whole(f"{_TRAINING}.gradient_accumulation_steps")
    return {"global_batch_size": micro * steps * (devices // parts)}


def _evaluation(value: Any, values: Values) -> Meaning:
    batch = _batch(None, values)
    micro = values.whole(f"{_TRAINING}.per_device_train_batch_size")
    size = None if isinstance(batch, Refused | Unused) else batch["global_batch_size"]
    return evaluation_batch("sft_train.infer_batch_size", size, micro, values)


def _epochs(value: Any, values: Values) -> Meaning:
    try:
        return {"num_epochs": values.whole(f"{_TRAINING}.num_train_epochs")}
    except ValueError:
        return Refused("expects whole passes over the data; give --train-iters for less")


def _template(value: Any, values: Values) -> Meaning:
    chosen = values.get("global_template") or value
    return {} if chosen is None else {"chat_template": chosen}


def _warm_up(value: Any, values: Values) -> Meaning:
    if values.whole(f"{_TRAINING}.warmup_steps", 0) > 0:
        return Unused("warmup_steps says it")
    return {"lr_warmup_fraction": value} if value else {}


def _shards(value: Any, values: Values) -> Meaning:
    mapping = values.get("sft_train.device_mapping")
    if value in (None, -1, processes() if mapping is None else devices_of(mapping)):
        return {}
    return Refused("shards are spread over all processes; leave it out")


def _tracker(value: Any, values: Values) -> Meaning:
    if value == "wandb":
        project = values.get("tracker_kwargs.project")
        return {"wandb_project": project} if project else Refused("name tracker_kwargs.project")
    if value in ("tensorboard", "stdout", None):
        return {}  # written always
    return Refused("logs go to TensorBoard, metrics.jsonl and wandb; name one of these")


def _of_tracker(tracker: str, flag: str) -> Rule:
    def rule(value: Any, values: Values) -> Meaning:
        if values.get("track_with", "tensorboard") != tracker or value is None:
            return Unused(f"it is of track_with: {tracker}")
        return {flag: value}

    return rule


def _with_lora(flag: str) -> Rule:
    def rule(value: Any, values: Values) -> Meaning:
        targets = values.get(f"{_MODEL}.lora_target")
        if value is None or targets is None:
            return Unused("without lora_target all weights are trained")
        if flag != "lora_targets":
            return {flag: value}
        names = ["all" if word in ("all", "all-linear") else word for word in targets.split(",")]
        rank = values.whole(f"{_MODEL}.lora_rank", 8)
        return {"lora_targets": [name.strip() for name in names], "lora_rank": rank}

    return rule


_PRECISION = precision(f"{_STRATEGY}.param_dtype", f"{_MODEL}.dtype")
_FRAMEWORK = Unused("it is of ROLL's processes")
_RULES: dict[str, Rule] = {
    "hydra": Unused("it is of Hydra's process"),
    "exp_name": _of_tracker("wandb", "wandb_exp_name"),
    "seed": "seed",
    "output_dir": "output_dir",
    "logging_dir": Unused("train.log lies in the output folder"),
    "system_envs": Unused("set variables where the job is started"),
    "track_with": _tracker,
    "tracker_kwargs.log_dir": _of_tracker("tensorboard", "tensorboard_dir"),
    "tracker_kwargs.project": _of_tracker("wandb", "wandb_project"),
    "tracker_kwargs.name": _of_tracker("wandb", "wandb_exp_name"),
    "tracker_kwargs.api_key": Refused("no file may hold a key; set WANDB_API_KEY"),
    "tracker_kwargs": Unused("a tracker shows the run's configuration"),
    "num_gpus_per_node": Unused("the launcher says how many processes a node has"),
    "num_nodes": Unused("the launcher says how many nodes there are"),
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "eval_steps": "eval_interval",
    "max_ckpt_to_keep": lambda value, _: {"keep_checkpoints": value} if value else {},
    "resume_from_checkpoint": checkpoint_to_load,
    "checkpoint_config": Unused("checkpoints lie in the output folder"),
    "sequence_length": "seq_length",
    "max_grad_norm": "clip_grad",
    "pretrain": "hf_model",
    "system_key": "system_key",
    "prompt_key": "prompt_key",
    "query_key": "query_key",
    "response_key": "response_key",
    "global_template": _template,
    "validation.data_args.file_name": "valid_data_files",
    "validation.data_args.template": Unused("validation rows are rendered as training rows are"),
    f"{_MODEL}.dtype": _PRECISION,
    f"{_MODEL}.adapter_name_or_path": "lora_adapter",
    f"{_MODEL}.lora_target": _with_lora("lora_targets"),
    f"{_MODEL}.lora_rank": _with_lora("lora_rank"),
    f"{_MODEL}.lora_alpha": _with_lora("lora_alpha"),
    f"{_MODEL}.lora_dropout": _with_lora("lora_dropout"),
    f"{_MODEL}.attn_implementation": Unused("the machine decides"),
    f"{_MODEL}.disable_gradient_checkpointing": {
        True: {},
        False: {"recompute_granularity": "full"},
    },
    f"{_MODEL}.moe_aux_loss_coef": "moe_aux_loss_coeff",
    f"{_MODEL}.freeze_module_prefix": {
        "vision_model": {"freeze": "vision"},
        "vision_model,projector": {"freeze": "vision"},
    },
    f"{_MODEL}.ulysses_size": "context_parallel_size",
    f"{_TRAINING}.num_train_epochs": _epochs,
    f"{_TRAINING}.per_device_train_batch_size": "micro_batch_size",
    f"{_TRAINING}.gradient_accumulation_steps": _batch,
    f"{_TRAINING}.learning_rate": "lr",
    f"{_TRAINING}.lr_scheduler_type": {
        "linear": {"lr_decay_style": "linear"},
        "cosine": {"lr_decay_style": "cosine"},
        "constant": {"lr_decay_style": "constant"},
        "constant_with_warmup": {"lr_decay_style": "constant"},
    },
    f"{_TRAINING}.warmup_steps": lambda value, _: {"lr_warmup_iters": value} if value else {},
    f"{_TRAINING}.warmup_ratio": _warm_up,
    f"{_TRAINING}.weight_decay": "weight_decay",
    f"{_TRAINING}.adam_beta1": "adam_beta1",
    f"{_TRAINING}.adam_beta2": "adam_beta2",
    f"{_TRAINING}.dataloader_num_workers": Unused("packs are read without loader processes"),
    f"{_TRAINING}.save_hf_model": {True: {"save_hf": True}, False: {}},
    f"{_TRAINING}.bf16": {True: {"bf16": True}, False: {}},
    f"{_TRAINING}.fp16": {True: {"fp16": True}, False: {}},
    f"{_DATA}.file_name": "finetune_data_files",
    f"{_DATA}.template": _template,
    f"{_DATA}.preprocessing_num_workers": "data_workers",
    f"{_DATA}.messages": "messages_key",
    f"{_DATA}.dataset_type": Unused("a file's name says what it holds"),
    f"{_DATA}.image_max_pixels": "max_pixels",
    f"{_DATA}.image_min_pixels": "min_pixels",
    f"{_DATA}.domain_interleave_probs": Refused("write file_name: [PATH=WEIGHT, ...]"),
    "sft_train.strategy_args.strategy_name": {
        "megatron_train": {"model_backend": "megatron"},
        "fsdp2_train": {"model_backend": "transformers", "use_torch_fsdp2": True},
        "deepspeed_train": Refused(
            "DeepSpeed is not used here; FSDP2 shards weights, gradients and optimizer too: "
            "strategy_name: fsdp2_train without strategy_config (--use-torch-fsdp2)"
        ),
    },
    f"{_STRATEGY}.virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
    f"{_STRATEGY}.moe_grouped_gemm": Unused("the machine decides how experts are computed"),
    f"{_STRATEGY}.fsdp_size": _shards,
    f"{_STRATEGY}.param_dtype": _PRECISION,
    f"{_STRATEGY}.reduce_dtype": Unused("gradients are summed in fp32"),
    f"{_STRATEGY}.reshard_after_forward": Unused("weights are gathered anew in the backward pass"),
    f"{_STRATEGY}.offload_policy": {False: {}, True: Refused("weights stay on their devices")},
    f"{_STRATEGY}.wrap_policy": Unused("the model's class says what is wrapped"),
    _STRATEGY: "*",
    "sft_train.device_mapping": _batch,
    "sft_train.infer_batch_size": _evaluation,
    "sft_train.backend_timeout": "distributed_timeout_minutes",
    "sft_train.use_sequence_packing": Unused("documents are always packed, and kept apart"),
    "sft_train.sequence_packing_args": Unused("--packing says how packs are filled"),
    "sft_train.logits_in_fp32": Unused("losses are computed in fp32"),
    "sft_train.apply_loss_scale": Unused("every trained token of a step weighs the same"),
    "sft_train.system_envs": Unused("set variables where the job is started"),
}
_FRAMEWORK_KEYS = "name worker_cls world_size num_gpus_per_worker max_concurrency offload_nccl"
_RULES |= {f"sft_train.{name}": _FRAMEWORK for name in _FRAMEWORK_KEYS.split()}
_RULES |= {
    name: Unused("ROLL's SFT pipeline does not read it")
    for name in f"""
    max_steps rpc_timeout rollout_batch_size val_batch_size prompt_length response_length
    model_update_buffer_size_mb algorithm reward critic {_MODEL}.model_name_or_path
    {_TRAINING}.max_steps {_TRAINING}.seed {_TRAINING}.data_seed {_TRAINING}.output_dir
    sft_train.model_update_frequency sft_train.generating_args sft_train.pg_variant
    """.split()
}

ROLL = System(
    "ROLL",
    "sft_train",
    _RULES,
    {
        "seed": 42,
        "save_steps": 50,
        "eval_steps": 10,
        "sft_train.strategy_args.strategy_name": "fsdp2_train",
        f"{_TRAINING}.num_train_epochs": 1,
        f"{_TRAINING}.per_device_train_batch_size": 8,
        f"{_TRAINING}.gradient_accumulation_steps": 1,
        f"{_TRAINING}.learning_rate": 5e-5,
        f"{_TRAINING}.lr_scheduler_type": "linear",
        f"{_TRAINING}.adam_beta2": 0.999,
    },
)
