"""The models and rows of check.py: tiny ones of each family, 1B- and 8B-shaped ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scripts.quickstart.base_model import VOCAB_SIZE

SPEED_SEQ_LENGTH = 4096
Row = dict[str, Any]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}


@dataclass(frozen=True)
class Size:
    """Shape of a Llama model whose speed is measured."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        """The HuggingFace configuration."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=SPEED_SEQ_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=self.tied,
        )

    @property
    def parameters(self) -> int:
        """Parameters, without those of the norms."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * head_dim * (self.heads + self.groups)
        layer = attention + 3 * self.hidden * self.feed_forward
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden


# The shapes of Llama 3.2 1B and Llama 3.1 8B, from their published config.json; "tiny" is for --device cpu.
SIZES = {
    "tiny": Size(64, 192, 2, 4, 2, VOCAB_SIZE, True),
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False),
}


def make_family(family: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tiny model of a family, in which no two parameters are alike, and its tokenizer."""
    config_class, options = FAMILIES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def long_rows(rows: Sequence[Row], number: int) -> Iterator[Row]:
    """Conversations of some hundred to some thousand tokens, put together from short ones."""
    rng = random.Random(0)
    for _ in range(number):
        # Lengths spread over a factor of about 20, as those of chat data do.
        turns = round(10 * math.exp(rng.uniform(0.0, 3.0)))
        messages: list[Any] = []
        while len(messages) < turns:
            messages += [m for m in rng.choice(rows)["messages"] if m["role"] != "system"]
        yield {"messages": messages}
