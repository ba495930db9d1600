"""Does the attention kernel isolate documents, and pieces of them as context parallelism cuts them?"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from post_training.batch.context_parallel import ContextParallelCut
from post_training.batch.host_tensors import to_device
from post_training.batch.packed_documents import PackedDocuments
from post_training.model.attention import PackedAttention

HEADS, GROUPS, HEAD_DIM = 8, 2, 64
BOUNDS = [0, 700, 705, 1100, 2048]
# bf16 has 8 bits of precision; the CPU's own bf16 attention is 1e-2 away. A leak is of size 1.
TOLERANCE = 4e-2


def compare_attention(device: str) -> tuple[float, int]:
    """Run `PackedAttention` in bf16 on the device against fp32 on the CPU: output and gradients.

    Returns:
        The largest difference, and how many comparisons were beyond `TOLERANCE`.
    """
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    torch.manual_seed(0)
    tokens = BOUNDS[-1]
    rows = [torch.randn(tokens, 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    worst, failures = 0.0, 0
    lengths = [end - begin for begin, end in itertools.pairwise(BOUNDS)]
    for size in (1, 4):
        for rank in range(size):
            cut = ContextParallelCut.make(BOUNDS, size=size, rank=rank)
            # The keys that `PackedAttention` would choose from those of all ranks are chosen here.
            gathered = torch.cat(
                [
                    ContextParallelCut.make(BOUNDS, size=size, rank=each).local_indices
                    for each in range(size)
                ]
            )
            keys = gathered[cut.key_indices]
            parts = [rows[0][cut.local_indices], rows[1][keys], rows[2][keys]]
            found = []
            for where, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
                packed = PackedDocuments.from_cut(cut, lengths)
                packed = dataclasses.replace(packed, key_indices=None)
                packed = to_device(packed, torch.device(where))
                inputs = [
                    part.to(torch.bfloat16).to(where, dtype).requires_grad_() for part in parts
                ]
                out = attention(*inputs, None, packed_seq_params=packed)
                gradients = torch.autograd.grad(out.float().square().sum(), inputs)
                found.append([x.detach().float().cpu() for x in (out, *gradients)])
            for right, got in zip(*found, strict=True):
                # Relative to the largest value: gradients of keys add up over many queries.
                error = ((right - got).abs().max() / right.abs().max()).item()
                worst = max(worst, error)
                failures += not error <= TOLERANCE
    return worst, failures
