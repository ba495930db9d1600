"""What flags of other training programs are called here, for the message about a flag that there is not.

The names are those of `TrainingArguments` of transformers 5, `SFTConfig` and `ScriptArguments` of TRL,
LLaMA-Factory's `hparams`, axolotl's configuration, and ModelOpt's parser in Megatron-LM.
An answer that begins with `--` is the flag to use; another is a sentence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NUMBER = "--micro-batch-size, for each data parallel process"
_ALL = "--global-batch-size, the packs of a whole step"
_FILES = "--finetune-data-files"

_LAYERS = "--transformer-impl; a checkpoint is read by either implementation"
_FAMILY = "what an architecture computes follows from --hf-model; leave it out"

# By name without dashes in front, with underscores.
OTHER_NAMES: dict[str, str] = {
    # The optimizer and its schedule.
    "learning_rate": "--lr",
    "min_learning_rate": "--min-lr",
    "lr_scheduler_type": "--lr-decay-style (cosine, linear, constant, WSD)",
    "lr_scheduler": "--lr-decay-style (cosine, linear, constant, WSD)",
    "lr_scheduler_kwargs": "--min-lr and --lr-decay-style",
    "warmup_ratio": "--lr-warmup-fraction",
    "warmup_steps": "--lr-warmup-iters",
    "max_grad_norm": "--clip-grad",
    "optim": "--optimizer (adam, which is AdamW, or sgd)",
    "adam_epsilon": "--adam-eps",
    "label_smoothing_factor": "there is none; the loss is cross-entropy over trained tokens",
    "neftune_noise_alpha": "there is no such noise",
    # Batches and steps.
    "per_device_train_batch_size": _NUMBER,
    "train_batch_size": _NUMBER,
    "batch_size_per_device": _NUMBER,
    "per_device_eval_batch_size": "--eval-micro-batch-size",
    "eval_batch_size": "--eval-micro-batch-size",
    "gradient_accumulation_steps": f"{_ALL}: micro batch x accumulation x data parallel processes",
    "num_train_epochs": "--num-epochs",
    "epochs": "--num-epochs",
    "max_steps": "--train-iters",
    "steps": "--train-iters",
    "max_seq_length": "--seq-length",
    "max_length": "--seq-length",
    "cutoff_len": "--seq-length",
    "sequence_len": "--seq-length",
    "model_max_length": "--seq-length",
    "packing_strategy": "--packing",
    "sample_packing": "--packing (documents are always packed)",
    # The model.
    "model_name_or_path": "--hf-model",
    "model_name": "--hf-model",
    "model": "--hf-model",
    "base_model": "--hf-model",
    "tokenizer_name_or_path": "--hf-tokenizer",
    "tokenizer_name": "--hf-tokenizer",
    "attn_implementation": "attention is chosen by the machine; leave it out",
    "torch_dtype": "--bf16, --fp16 or --fp32",
    "dtype": "--bf16, --fp16 or --fp32",
    "tf32": "--fp32 trains in fp32; leave it out",
    "gradient_checkpointing": "--recompute-granularity full",
    "use_lora": "--lora-rank",
    "use_peft": "--lora-rank",
    "lora_r": "--lora-rank",
    "lora_target": "--lora-targets",
    "lora_target_modules": "--lora-targets",
    "use_rslora": "--rslora",
    "use_dora": "only plain LoRA is trained (--lora-rank)",
    "adapter_name_or_path": "--lora-adapter",
    "finetuning_type": "all weights are trained, or with --lora-rank an adapter; leave it out",
    "load_in_4bit": "--base-precision nf4, with --lora-rank",
    "load_in_8bit": "--base-precision nf4, with --lora-rank, keeps a frozen base in 4 bits",
    # Data.
    "dataset_name": "--finetune-hf-dataset (or --finetune-data-files for files)",
    "dataset": "--finetune-hf-dataset (or --finetune-data-files for files)",
    "datasets": "--finetune-hf-dataset (or --finetune-data-files for files)",
    "dataset_path": _FILES,
    "dataset_dir": _FILES,
    "train_file": _FILES,
    "train_data": _FILES,
    "data_files": _FILES,
    "train_files": _FILES,
    "validation_file": "--valid-data-files",
    "eval_data": "--valid-data-files",
    "test_file": "--test-data-files",
    "dataset_train_split": "--finetune-data-split",
    "dataset_split": "--finetune-data-split",
    "dataset_text_field": "--messages-key, --prompt-key and --response-key",
    "val_size": "--split-ratio, such as 0.98,0.01,0.01",
    "val_set_size": "--split-ratio, such as 0.98,0.01,0.01",
    "template": "--chat-template (by default the tokenizer's own)",
    "chat_template_path": "--chat-template",
    "assistant_only_loss": "--loss-on; only what the assistant says is trained, always",
    "completion_only_loss": "--loss-on; only what the assistant says is trained, always",
    "train_on_prompt": "only what the assistant says is trained; see --loss-on",
    "dataset_num_proc": "--data-workers",
    "preprocessing_num_workers": "--data-workers",
    "dataloader_num_workers": "packs are read without loader processes; --data-workers tokenise",
    "overwrite_cache": "a cache is made anew when its data change; leave it out",
    "data_seed": "--seed",
    # Output.
    "save_steps": "--save-interval",
    "eval_steps": "--eval-interval",
    "logging_steps": "--log-interval",
    "save_total_limit": "--keep-checkpoints",
    "save_strategy": "--save-interval",
    "eval_strategy": "--eval-interval (and --valid-data-files or --split-ratio)",
    "evaluation_strategy": "--eval-interval (and --valid-data-files or --split-ratio)",
    "logging_strategy": "--log-interval",
    "logging_dir": "--tensorboard-dir",
    "report_to": "--wandb-project, or nothing: TensorBoard is written always",
    "run_name": "--wandb-exp-name",
    "resume_from_checkpoint": (
        "the same command goes on from its newest checkpoint; --load names another run's"
    ),
    "overwrite_output_dir": "another --output-dir starts anew; the same goes on",
    "do_train": "training is what is done; leave it out (--eval-only only evaluates)",
    "do_eval": "--valid-data-files or --split-ratio; --eval-only only evaluates",
    "do_predict": "scripts/generate.py generates",
    "push_to_hub": "scripts/export_hf.py writes a HuggingFace folder, and uploads it where asked",
    "stage": "supervised finetuning is what is done; leave it out",
    # Layout.
    "deepspeed": "--use-distributed-optimizer, which is on, or --use-torch-fsdp2",
    "fsdp": "--use-torch-fsdp2",
    "tensor_parallel_size": "--tensor-model-parallel-size",
    "tp_size": "--tensor-model-parallel-size",
    "pipeline_parallel_size": "--pipeline-model-parallel-size",
    "pp_size": "--pipeline-model-parallel-size",
    "cp_size": "--context-parallel-size",
    "sequence_parallel_size": "--context-parallel-size",
    "expert_parallel_size": "--expert-model-parallel-size",
    "ep_size": "--expert-model-parallel-size",
    "data_parallel_size": "it is what the other parallel sizes leave of all processes; leave it out",
    "dp_size": "it is what the other parallel sizes leave of all processes; leave it out",
    "ddp_timeout": "--distributed-timeout-minutes",
    # ModelOpt's flags in Megatron-LM.
    "export_model_type": "the model follows from --hf-model; leave it out",
    "export_te_mcore_model": _LAYERS,
    "export_default_te_spec": _LAYERS,
    "export_force_local_attention": "--transformer-impl local",
    "export_legacy_megatron": "checkpoints are Megatron's torch_dist; scripts/export_hf.py writes others",
    "export_qk_l2_norm": _FAMILY,
    "export_moe_apply_probs_on_input": _FAMILY,
    "enable_gpt_oss": _FAMILY,
    "export_real_quant_cfg": "--export-quant-cfg; scripts/export_hf.py writes such a run in 8 bits",
    "export_kv_cache_quant": "caches of keys and values are not quantised; leave it out",
    "export_kd_finalize": "a student's checkpoint is the student's alone; scripts/export_hf.py exports it",
    "eagle_config": "the draft's sizes are its base's; --draft-vocab-size, --aux-layers, --draft-ttt-steps",
    "draft_vocab_cache": "--draft-vocab-size chooses from the training data",
    "ttt_length": "--draft-ttt-steps",
    "ttt_steps": "--draft-ttt-steps",
}


def hint_for(name: str, known: Iterable[str]) -> str:
    """What to say after "no such flag", beginning with what parts it from that.

    Args:
        name: as it was written, with dashes or underscores.
        known: the flags there are, spelled in the same way.
    """
    plain = name.lstrip("-").replace("-", "_")
    answer = OTHER_NAMES.get(plain)
    if answer is not None:
        return f"; {'use ' if answer.startswith('--') else ''}{answer}"
    known = list(known)
    # With underscores, as HuggingFace's are written.
    near = difflib.get_close_matches(
        name.replace("_", "-") if name[:1] == "-" else name, known, n=1
    )
    if near:
        return f"; did you mean {near[0] if name[:1] == '-' else near[0].replace('_', '-')}?"
    return " (finetune.py --help-all lists all)"
