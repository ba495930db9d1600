"""Elements of a model's weights that one rank holds, from the flags: nothing is built.

Held against the real tensors of tiny models in tests/post_training/layout/test_memory.py.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from post_training.adapters.settings import chosen_targets
from post_training.hf.families import family_of
from post_training.layout.pipeline import divide_layers
from post_training.layout.sizes import padded_vocabulary


@dataclass(frozen=True)
class Parameters:
    """Elements that one rank holds."""

    dense: float = 0
    expert: float = 0
    """Of the routed experts, whose optimizer shards over another group."""

    def __add__(self, other: Parameters) -> Parameters:
        """Both."""
        return Parameters(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> float:
        """All elements."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Sizes:
    """Widths of a layer as a whole, in elements a token."""

    query: int
    keys: int
    value: int
    """What attention gives to its output projection."""
    latent: int
    """Compressed queries and keys of multi-latent attention, before and after their norms."""
    feed_forward: int
    expert: int
    shared: int
    gate: int
    """Feed-forward inputs a layer's output is made of: 2 of a gated one."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Sizes:
        """From the flags."""
        heads = args.num_attention_heads
        groups = args.num_query_groups if args.group_query_attention else heads
        width = args.kv_channels or args.hidden_size // heads
        query, keys, value, latent = heads * width, groups * width, heads * width, 0
        if args.multi_latent_attention:
            query = keys = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
            value = heads * args.v_head_dim
            latent = (args.q_lora_rank or 0) + args.kv_lora_rank
        ffn = args.ffn_hidden_size or default_feed_forward(args)
        return cls(
            query,
            keys,
            value,
            latent,
            ffn,
            args.moe_ffn_hidden_size or ffn,
            args.moe_shared_expert_intermediate_size or 0,
            2 if args.swiglu or args.quick_geglu else 1,
        )


def default_feed_forward(args: argparse.Namespace) -> int:
    """Megatron's feed-forward size where no flag gives one (`validate_args`)."""
    hidden = int(args.hidden_size)
    return int(hidden * 4 * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden


def is_sparse(args: argparse.Namespace) -> list[bool]:
    """Of each layer, whether it has experts."""
    pattern = args.moe_layer_freq
    if not args.num_experts:
        return [False] * args.num_layers
    if isinstance(pattern, list):
        return [bool(each) for each in pattern]
    return [layer % pattern == 0 for layer in range(args.num_layers)]


def layer_parameters(args: argparse.Namespace, *, sparse: bool) -> Parameters:
    """Elements of one layer on one rank."""
    sizes, hidden, tp = Sizes.of(args), args.hidden_size, args.tensor_model_parallel_size
    norm = 2 if args.normalization == "LayerNorm" else 1  # weight, and bias
    bias, qkv_bias = args.add_bias_linear, args.add_bias_linear or args.add_qkv_bias
    norms = len(family_of(args.hf_config).norms) if args.hf_config is not None else 2
    whole = norms * norm * hidden  # lies on every tensor parallel rank
    if args.multi_latent_attention:
        heads, rope = args.num_attention_heads, args.qk_pos_emb_head_dim
        whole += args.kv_lora_rank
        cut = hidden * (args.kv_lora_rank + rope)
        cut += args.kv_lora_rank * (heads * args.qk_head_dim + sizes.value) + sizes.value * hidden
        if args.q_lora_rank:
            whole += args.q_lora_rank
            cut += args.q_lora_rank * (hidden + sizes.query)
        else:
            cut += hidden * sizes.query
    else:
        columns = sizes.query + 2 * sizes.keys
        cut = hidden * (columns + sizes.value) + qkv_bias * columns
        cut += args.num_attention_heads * (args.softmax_type == "learnable")
        whole += bias * hidden
        if args.qk_layernorm:
            whole += 2 * norm * (sizes.query // args.num_attention_heads)
    if not sparse:
        cut += (sizes.gate + 1) * hidden * sizes.feed_forward
        cut += bias * sizes.gate * sizes.feed_forward
        return Parameters(dense=whole + bias * hidden + cut / tp)
    whole += (hidden + bias) * args.num_experts
    cut += (sizes.gate + 1) * hidden * sizes.shared
    if sizes.shared and args.moe_shared_expert_gate:
        whole += hidden
    expert_tp = args.expert_tensor_parallel_size or tp
    experts = args.num_experts / args.expert_model_parallel_size
    one = (sizes.gate + 1) * hidden * sizes.expert / expert_tp
    one += bias * (sizes.gate * sizes.expert / expert_tp + hidden)
    return Parameters(dense=whole + cut / tp, expert=experts * one)


def vocabulary_rows(args: argparse.Namespace) -> int:
    """Rows of the embedding on one rank."""
    size = padded_vocabulary(args.padded_vocab_size or args.vocab_size or 0, args)
    return size // int(args.tensor_model_parallel_size)


def stage_parameters(args: argparse.Namespace) -> list[Parameters]:
    """Elements on one rank of each pipeline stage."""
    tables = [args.hidden_size * vocabulary_rows(args)]
    sparse = is_sparse(args)
    found = []
    stages = divide_layers(args)
    for number, layers in enumerate(stages):
        first, last = number == 0, number == len(stages) - 1
        count = Parameters()
        for layer in layers:
            count += layer_parameters(args, sparse=sparse[layer])
        if first:
            positions = args.position_embedding_type == "learned_absolute"
            count += Parameters(
                tables[0] + positions * args.hidden_size * (args.max_position_embeddings or 0)
            )
        if last:
            norm = 2 if args.normalization == "LayerNorm" else 1
            # Tied weights are there twice where first and last stage are two.
            own = args.untie_embeddings_and_output_weights or not first
            count += Parameters(norm * args.hidden_size + own * tables[0])
        found.append(count)
    return found


def adapter_parameters(args: argparse.Namespace) -> list[Parameters]:
    """Elements of `--lora-rank` on one rank of each stage, cut as `adapters/layers.py` cuts them."""
    tp, stages = args.tensor_model_parallel_size, divide_layers(args)
    found = [Parameters() for _ in stages]
    for target in chosen_targets(args.hf_config, args.lora).values():
        parts = target.parameter.split(".")
        stage = 0 if target.is_embedding else len(stages) - 1
        if "layers" in parts:
            layer = int(parts[parts.index("layers") + 1])
            stage = next(number for number, layers in enumerate(stages) if layer in layers)
        a, b = (math.prod(shape) for shape in target.shapes)
        share = (args.expert_tensor_parallel_size or tp) if target.weight.of_expert else tp
        by_columns = target.weight.layout == "columns" or target.is_embedding
        held = a / share + b if by_columns else a + b / share
        if target.weight.of_expert:
            found[stage] += Parameters(expert=held / args.expert_model_parallel_size)
        else:
            found[stage] += Parameters(dense=held)
    return found
