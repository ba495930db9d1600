"""Megatron's plain `pretrain()` on mock data, on a CPU: writes a checkpoint without a manifest.

Run as a script: HF_MODEL FOLDER, and further flags of Megatron. Only the platform layer is this project's.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import sys
from typing import Any

from post_training import platform

platform.apply()

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from post_training.hf.config import load_hf_config, megatron_flags


class MockData(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of random tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(index))
        return torch.randint(0, 300, (get_args().seq_length + 1,), generator=generator)


def forward_step(iterator: Any, model: Any) -> Any:
    """Next-token losses of a batch of rows."""
    rows = next(iterator)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]

    def loss(output: torch.Tensor) -> Any:
        count = torch.tensor(output.numel(), dtype=torch.int)
        return output.sum(), count, {"lm loss": torch.stack([output.sum().detach(), count])}

    return model(tokens, positions, mask, labels=labels), loss


def main() -> None:
    """Train two steps and save."""
    model, folder, *flags = sys.argv[1:]
    sys.argv = [
        *(sys.argv[0], "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "391"),
        *("--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "4"),
        *("--seq-length", "32", "--max-position-embeddings", "64", "--lr", "1e-3"),
        *("--eval-interval", "2", "--eval-iters", "0"),
        *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
        *("--save", folder, "--save-interval", "2", "--transformer-impl", "local"),
        *("--distributed-backend", "gloo", "--no-gradient-accumulation-fusion", *flags),
    ]
    args = parse_args()
    for name, value in megatron_flags(load_hf_config(model)).items():
        setattr(args, name, value)
    args.padded_vocab_size = 512  # as Megatron pads 391 for one rank
    args.no_persist_layer_norm = True
    args.bias_swiglu_fusion = args.masked_softmax_fusion = args.apply_rope_fusion = False
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        lambda numbers: (MockData(), None, None),
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
