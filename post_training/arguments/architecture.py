"""Megatron's flags that make a model, by destination name."""

# What makes a model's tensors, and what it computes with them. With --hf-model each must be what its
# configuration says, or Megatron's default; a checkpoint is compared with a run in all of them.
ARCHITECTURE = tuple(
    """
    num_layers hidden_size ffn_hidden_size vocab_size untie_embeddings_and_output_weights
    num_attention_heads group_query_attention num_query_groups kv_channels add_qkv_bias qk_layernorm
    attention_output_gate normalization layernorm_epsilon layernorm_zero_centered_gamma
    add_bias_linear swiglu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value
    position_embedding_type rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling no_rope_freq mrope_section
    use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
    mup_attn_scale_power
    num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_pre_softmax
    moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_apply_probs_on_input moe_latent_size
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
    """.split()
)
