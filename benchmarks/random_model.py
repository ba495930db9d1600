"""A Qwen3-shaped HuggingFace folder with random weights around a given tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from post_training.hf.folder import TOKENIZER_FILES, copy_files
from post_training.hf.tokenizer import open_tokenizer


def make_qwen3(
    folder: Path, tokenizer: Path, *, hidden: int, layers: int, heads: int = 8, kv_heads: int = 4
) -> None:
    """Write configuration, random fp32 weights (fixed seed) and tokenizer to `folder`."""
    loaded = open_tokenizer(str(tokenizer), "tokenizer")
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
    copy_files(tokenizer, folder, TOKENIZER_FILES)
