"""Tiny configurations of causal language models of `transformers`, by model type, to try each of them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY = 391

_NONE = ("bos_token_id",)

# What most of them are told; a class passes over keys that it does not know.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_MLA: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "head_dim": 8,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "n_ctx": 512, "rotary_dim": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "ernie4_5": {},
    "exaone4": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": None},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "gemma": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 64,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_MLA, "num_key_value_heads": 2},
    "gpt2": {**_GPT2, "tie_word_embeddings": True},
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 64,
    },
    "gpt_neox": {},
    "gpt_oss": {**_MOE, "sliding_window": 64},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "granite": {},
    "granitemoehybrid": {
        **_MAMBA2,
        **_MOE,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 48,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        **_MOE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96},
    "llama": {},
    "llama4_text": {
        **_MOE,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
    "minimax": {**_MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "minimax_m2": _MOE,
    "mistral": {"sliding_window": 64},
    "mixtral": _MOE,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "layers_block_type": ["mamba", "attention"],
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": _MOE,
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": 64},
    "phimoe": {
        **_MOE,
        "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
    },
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 48},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _MOE,
    "qwen3_next": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 48},
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 64},
}


def tiny(model_type: str, **changed: Any) -> PretrainedConfig:
    """The configuration of an architecture, with about 100 thousand parameters."""
    options = _COMMON | changed | ARCHITECTURES[model_type]
    options = {key: value for key, value in options.items() if value is not None or key in _NONE}
    config = AutoConfig.for_model(model_type, **options)
    # A plain loop, too, computes what can be compared.
    for key, value in vars(config).items():
        if isinstance(value, float) and any(
            word in key for word in ("dropout", "pdrop", "layerdrop")
        ):
            setattr(config, key, 0.0)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    config.architectures = [named if isinstance(named, str) else named[0]]
    return config
