"""Megatron's flags that a run refuses, in tables by destination name.

Megatron's parser has about 900 flags, for pretraining, other models, inference and its own data files. One
that would be passed over here, or could not work, is refused with the reason: every flag that is taken has
a reader in the code that a run goes through, or asks for what is so anyway (`ALREADY_SO`). One that refines
another, such as `--profile-step-end`, has its effect only beside that, as in Megatron.
`ARCHITECTURE`, the flags that make a model, may be given only as its configuration has them.
The tables follow megatron-core 0.19.2; their tests fail where another version adds to what they cover.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from post_training.errors import SetupError
from post_training.machine.device import device_type

# What makes a model's tensors, and what it computes with them. With --hf-model each must be what its
# configuration says, or Megatron's default; a checkpoint is compared with a run in all of them.
ARCHITECTURE = tuple(
    """
    num_layers hidden_size ffn_hidden_size vocab_size untie_embeddings_and_output_weights
    num_attention_heads group_query_attention num_query_groups kv_channels add_qkv_bias qk_layernorm
    window_size window_attn_skip_freq softmax_type
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    rope_type rotary_scaling_factor mscale_all_dim
    attention_output_gate normalization layernorm_epsilon layernorm_zero_centered_gamma
    add_bias_linear swiglu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value
    position_embedding_type rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling no_rope_freq mrope_section
    use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
    mup_attn_scale_power
    num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_pre_softmax
    moe_router_enable_expert_bias moe_router_bias_update_rate
    moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_apply_probs_on_input moe_latent_size
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
    hybrid_layer_pattern mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    """.split()
)

_OWN_DATA = "data come from --finetune-data-files or --finetune-hf-dataset (docs/data.md)"
_OWN_TOKENIZER = "the tokenizer is that of --hf-model, or --hf-tokenizer"
_OTHER_ATTENTION = "attention is causal, over whole documents, with queries in groups"
_NO_MTP = "there is no loss for tokens further ahead (multi-token prediction)"
_ONLY_GPT = "only decoders are trained; state-space layers are those of --hf-model"
_MEGATRON_FSDP = "it belongs to --use-megatron-fsdp, which is not supported; use --use-torch-fsdp2"

# Whole groups of Megatron's parser, by title.
REFUSED_GROUPS = {
    "rl": "there is no reinforcement learning here",
    "biencoder": _ONLY_GPT,
    "vision": _ONLY_GPT,
    "mla": _OTHER_ATTENTION,
    "experimental_attention_variant": _OTHER_ATTENTION,
    "heterogeneous architecture": "all layers have one shape",
    "inference": "it is for Megatron's inference server; scripts/generate.py generates",
    "data and dataloader": _OWN_DATA,
    "tokenizer": _OWN_TOKENIZER,
    "Logits Distillation": "the loss knows no other model's logits",
    "autoresume": "start the same command again: it goes on from the newest checkpoint",
    "sft": "it is for Megatron's own SFT data and averages evaluations otherwise",
}
# Flags of these groups that have their use here, or, like loader processes, do no harm where a script
# for pretraining sets them.
KEPT = frozenset(
    """
    seq_length num_workers create_attention_mask_in_dataloader
    vocab_size padded_vocab_size trust_remote_code chat_template
    cuda_graph_modules cuda_graph_scope_deprecated
    """.split()
)
# Taken though nothing reads them here: what they ask for is so, or makes no difference to a result.
ALREADY_SO = {
    "attention_softmax_in_fp32": "every attention kernel here computes the softmax in fp32",
    "deprecated_use_mcore_models": "all models are made of megatron-core",
    "masked_softmax_fusion": "no attention here uses Megatron's softmax",
    "num_workers": "packs are read without loader processes",
    # Its default is the number of processes, so that config.yaml of a run on another number has it.
    "inprocess_active_world_size": "--inprocess-restart is refused",
}
# Flags that say more about another one and do nothing without it.
PART_OF = {
    "wandb_entity": "wandb_project",
    "wandb_exp_name": "wandb_project",
    "wandb_save_dir": "wandb_project",
}
# Flags of one optimizer, which another passes over.
OF_OPTIMIZER = {
    "adam_beta1": "adam",
    "adam_beta2": "adam",
    "adam_eps": "adam",
    "sgd_momentum": "sgd",
}

# Why, and single flags, which win over their group.
_REASONS: dict[str, str] = {
    "documents of a pack never see each other and their positions begin at 0, always": (
        "reset_position_ids reset_attention_mask dataloader_inter_document_masking"
    ),
    "the loss is taken on what the assistant wrote and its stop token (docs/templates.md)": "eod_mask_loss",
    "packs are made before training; --seed decides their order": "dataloader_type",
    "every step takes --global-batch-size packs": (
        "rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed"
    ),
    "a run counts iterations; use the flag that ends in -iters": (
        "lr_decay_samples lr_warmup_samples lr_wsd_decay_samples"
    ),
    "a sample is a pack here; use --num-epochs, or --train-iters, which is packs / --global-batch-size": (
        "train_samples"
    ),
    "its weights would be put over those of --hf-model; --load DIR --finetune starts from them": (
        "pretrained_checkpoint"
    ),
    "learning rate and weight decay go as this run's flags say (docs/checkpoints.md)": (
        "use_checkpoint_opt_param_scheduler override_opt_param_scheduler"
    ),
    "every evaluation covers the whole split and reports each source (docs/evaluation.md)": (
        "full_validation multiple_validation_sets validation_set_names"
    ),
    "nothing would be trained; use --eval-only": "freeze_all_layers",
    "use --recompute-activations, or --recompute-granularity full": "checkpoint_activations",
    "the model is that of --hf-model or of Megatron's flags": "spec yaml_cfg",
    "the model is that of --hf-model or of flags, the parallel sizes are those of flags": (
        "use_checkpoint_args use_mp_args_from_checkpoint_args"
    ),
    "scripts/export_hf.py writes another format": (
        "ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format"
    ),
    "start the same command again: it goes on from the newest checkpoint": (
        "inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval "
        "inprocess_monitor_process_interval inprocess_progress_watchdog_interval "
        "inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout "
        "inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout "
        "inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity "
        "inprocess_empty_cuda_cache"
    ),
    "the embedding is padded so that it can be split; the loss does not see the padding": (
        "pad_vocab_size"
    ),
    "use --num-layers": "encoder_num_layers decoder_num_layers",
    "a dense model is not turned into one with experts": (
        "moe_use_upcycling moe_upcycling_granularity"
    ),
    _OTHER_ATTENTION: (
        "window_size window_attn_skip_freq softmax_type multi_latent_attention qk_l2_norm rope_type "
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq "
        "dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation "
        "dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 "
        "experimental_attention_variant linear_conv_kernel_dim linear_key_head_dim "
        "linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow "
        "yarn_correction_range_round_to_int"
    ),
    _NO_MTP: (
        "mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads "
        "mtp_hybrid_override_pattern mtp_standalone"
    ),
    _ONLY_GPT: (
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
        "use_mamba_mem_eff_path mamba_training_ssm_states_dtype hybrid_layer_pattern "
        "hybrid_override_pattern bert_binary_head relative_attention_num_buckets "
        "relative_attention_max_distance"
    ),
    "no code of Megatron reads it": (
        "apply_residual_connection_post_layernorm openai_gelu onnx_safe rope_scaling_factor "
        "use_flash_attn dist_ckpt_save_pre_mcore_014"
    ),
    "it is for inference": (
        "flash_decode inference_cuda_graph_scope inference_fuse_tp_communication "
        "inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
        "nccl_all_reduce_for_prefill moe_pad_experts_for_cuda_graph_inference mlp_chunks_for_prefill"
    ),
    "use --ckpt-format": "dist_ckpt_format_deprecated",
    "the loss is computed in fp32": "fp16_lm_cross_entropy",
    "its tokens go to experts that the router did not choose": (
        "moe_router_force_load_balancing moe_router_force_biased"
    ),
    "Megatron multiplies it by untrained tokens too; --moe-aux-loss-coeff with "
    "--moe-router-load-balancing-type seq_aux_loss balances experts by document": (
        "moe_z_loss_coeff"
    ),
    "which tokens are dropped would depend on the packs they meet in a micro batch, and so on the "
    "parallel layout": "moe_expert_capacity_factor moe_expert_rank_capacity_factor",
    "a HuggingFace model has no place for the biases": (
        "moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema"
    ),
    "--context-parallel-size alone gathers keys and values from the whole group": (
        "hybrid_context_parallel hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank"
    ),
    "weights are sharded by tensor, pipeline and expert parallelism, or --use-torch-fsdp2": (
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards"
    ),
    "gradients are divided by the trained tokens of all ranks, after they are summed": (
        "ddp_average_in_collective"
    ),
    "the optimizer is sharded over all data parallel ranks": "num_distributed_optimizer_instances",
    "weights are filled in before they are sharded": "init_model_with_meta_device",
    "the loss function is not Megatron's; a loss that is not finite ends a run": "check_for_spiky_loss",
    "packs are read without loader processes": "exit_signal_handler_for_dataloader",
    "it would train on no other process's gradients": "fake_process_group",
    "process groups are this program's own": "lazy_mpu_init",
    _MEGATRON_FSDP: (
        "use_megatron_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy "
        "fsdp_manual_registration fsdp_double_buffer suggested_communication_unit_size "
        "keep_fp8_transpose_cache enable_full_sharding_in_hsdp megatron_fsdp_main_params_dtype "
        "megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype "
        "megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer "
        "fsdp_db_use_persist_buf_on_alloc_fail gradient_reduce_div_fusion"
    ),
    "--async-save writes by Megatron's own worker, which is made deaf to signals": (
        "async_strategy async_ckpt_use_cpu_shm"
    ),
    "each rank writes its own share of the optimizer's state (docs/checkpoints.md)": (
        "distrib_optim_fully_reshardable_mem_efficient"
    ),
    "only adam and sgd are supported": (
        "muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec "
        "muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor "
        "muon_scalar_optimizer lion_beta1 lion_beta2"
    ),
}
REFUSED = {flag: reason for reason, flags in _REASONS.items() for flag in flags.split()}

# Flags of which some values work; the rest is refused.
VALUES: dict[str, tuple[str, ...]] = {"optimizer": ("adam", "sgd")}

NEEDS_TRANSFORMER_ENGINE = tuple(
    """
    tp_comm_overlap layernorm_zero_centered_gamma attention_backend flash_attention_version
    apply_query_key_layer_scaling qk_clip log_max_attention_logit fp8 fp4 fp8_param_gather
    fp4_param_gather te_precision_config_file use_te_activation_func use_transformer_engine_op_fuser
    cpu_offloading_num_layers te_rng_tracker defer_embedding_wgrad_compute
    use_precision_aware_optimizer optimizer_cpu_offload fp32_residual_connection
    """.split()
)
NEEDS_CUDA = tuple(
    """
    cuda_graph_impl enable_cuda_graph external_cuda_graph record_memory_history log_energy
    distributed_backend gpu_sniff_test_interval
    """.split()
)
# Of the architecture, what weights do not depend on: its name in config.json.
CONFIG_KEYS = {
    "moe_router_topk": "num_experts_per_tok",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
}


class MegatronFlags:
    """The flags of a parser as Megatron made it, before defaults are changed."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        """Note every flag's default and, for refused ones, the reason."""
        self._actions: dict[str, list[argparse.Action]] = {}
        self.refused: dict[str, str] = {}
        for group in parser._action_groups:
            reason = REFUSED_GROUPS.get(group.title or "")
            for action in group._group_actions:
                self._actions.setdefault(action.dest, []).append(action)
                if reason is not None and action.dest not in KEPT:
                    self.refused[action.dest] = reason
        self.refused |= REFUSED
        # Where two flags set one destination argparse takes the first one's default.
        self.defaults = {dest: actions[0].default for dest, actions in self._actions.items()}

    def check(
        self, args: argparse.Namespace, derived: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Refuse flags that contradict `--hf-model` or that a run would pass over.

        Args:
            args: as parsed.
            derived: this project's defaults, by destination name.
            config: those of them that the HuggingFace configuration gives.

        Raises:
            SetupError: naming the flag, the reason, and what to do.
        """
        expected = {**self.defaults, **derived}
        for key in ARCHITECTURE if args.hf_model else ():
            if getattr(args, key) != expected[key]:
                other = CONFIG_KEYS.get(key)
                raise SetupError(
                    f"{self.written(key, args)}: --hf-model {args.hf_model} says "
                    f"{config.get(key, expected[key])}; leave the flag out"
                    + (f", or change {other} in its config.json" if other else "")
                )
        for key, reason in self.refused.items():
            if self._given(key, args, expected):
                raise SetupError(f"{self.written(key, args)} is not supported: {reason}")
        for key, other in PART_OF.items():
            if self._given(key, args, expected) and not getattr(args, other):
                raise SetupError(
                    f"{self.written(key, args)} does nothing without --{other.replace('_', '-')}; add it, "
                    f"or leave this out"
                )
        for key, values in VALUES.items():
            if getattr(args, key) not in values:
                raise SetupError(
                    f"{self.written(key, args)} is not supported: only {' and '.join(values)} are"
                )
        for key, optimizer in OF_OPTIMIZER.items():
            if self._given(key, args, expected) and args.optimizer != optimizer:
                raise SetupError(
                    f"{self.written(key, args)} does nothing without --optimizer {optimizer}; leave it out"
                )
        for key in NEEDS_CUDA if device_type() != "cuda" else ():
            if self._given(key, args, expected) and getattr(args, key) != "none":
                raise SetupError(f"{self.written(key, args)} needs CUDA; leave it out")
        if args.transformer_impl == "transformer_engine":
            return
        for key in NEEDS_TRANSFORMER_ENGINE:
            if self._given(key, args, expected):
                raise SetupError(
                    f"{self.written(key, args)} needs Transformer Engine; leave it out"
                )

    @staticmethod
    def _given(key: str, args: argparse.Namespace, expected: Mapping[str, Any]) -> bool:
        value = getattr(args, key)
        # A flag that is off is off, whatever stands for it: None, 0, an empty list.
        return bool(value != expected[key] and (value or expected[key]))

    def written(self, key: str, args: argparse.Namespace) -> str:
        """The flag as one writes it on the command line, with its value if it takes one."""
        value = getattr(args, key)
        for action in self._actions[key]:
            if action.nargs != 0:
                values = value if isinstance(value, list) else [value]
                # Of an enumeration, as one writes it.
                shown = (str(getattr(v, "name", v)) for v in values)
                return " ".join([action.option_strings[0], *shown])
            if action.const == value:
                return action.option_strings[0]
        # Set to its default, against ours, by --config.
        return f"{key}: {value}"
