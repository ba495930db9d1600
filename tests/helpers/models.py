"""Tiny HuggingFace models of every family, with a tokenizer trained on embedded text."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5Config,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from tests.helpers.architectures import tiny
from tests.helpers.rows import CHATML, SPECIAL_TOKENS, TEXT

# Not a multiple of 128: the embedding is padded in every test.
VOCABULARY = 391


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most 391 tokens that writes ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    assert len(tokenizer) == VOCABULARY
    return tokenizer


@dataclass(frozen=True)
class Family:
    """A model family: its configuration class, and what is special about it."""

    config: type[PretrainedConfig]
    options: dict[str, Any]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-3,  # not that of the latent vectors
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "ernie4_5": Family(Ernie4_5Config, {"head_dim": 16}),
    "glm4": Family(
        Glm4Config,
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gpt_oss": Family(
        GptOssConfig,
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "swiglu_limit": 1.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "granite": Family(
        GraniteConfig,
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.05,
            "logits_scaling": 0.5,
        },
    ),
    "llama": Family(LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": Family(MistralConfig, {"head_dim": 24, "sliding_window": None}),
    "mixtral": Family(MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": Family(
        NemotronHConfig,
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "time_step_min": 1.3,  # holds some of the steps, as the limits below
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 32,
            "routed_scaling_factor": 2.5,
        },
    ),
    "mamba2": Family(
        Mamba2Config,
        {
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "time_step_limit": [0.02, 0.05],
        },
    ),
    "phi3": Family(
        Phi3Config,
        {
            "sliding_window": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "qwen2": Family(Qwen2Config, {}),
    "qwen3": Family(Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "seed_oss": Family(
        SeedOssConfig, {"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0}
    ),
    "smollm3": Family(SmolLM3Config, {"no_rope_layer_interval": 2}),
}
# Whatever tie_word_embeddings says, which is refused: `transformers` does not tie them.
UNTIED = {"nemotron_h"}


def make_config(family: str, *, tied: bool = False, **options: Any) -> PretrainedConfig:
    """A configuration of 2 layers and hidden size 64; `options` win."""
    kind = FAMILIES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **kind.options,
        **options,
    }
    return kind.config(**values)


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in which no two parameters are alike: norms are not 1 and biases not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.06)
    return model.eval()


def save_model(folder: Path, family: str, *, tied: bool = False, **options: Any) -> Path:
    """Write model, configuration and tokenizer to `folder`, as a user downloads them."""
    other = family not in FAMILIES
    config = tiny(family, **options) if other else make_config(family, tied=tied, **options)
    model = make_model(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load_model(folder: Path) -> PreTrainedModel:
    """The HuggingFace model of a folder, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))
