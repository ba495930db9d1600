"""A Qwen3-shaped HuggingFace folder with random weights around a given tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM


def make_qwen3(
    folder: Path, tokenizer: Path, *, hidden: int, layers: int, heads: int = 8, kv_heads: int = 4
) -> None:
    """Write configuration, random fp32 weights (fixed seed) and tokenizer to `folder`."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen3Config(
        vocab_size=len(loaded),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)
