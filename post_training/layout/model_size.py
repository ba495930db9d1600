"""What a model takes: its parameters, and the bytes of a checkpoint."""

from __future__ import annotations

import argparse

from post_training.adapters.settings import chosen_targets, trained_parameters
from post_training.hf.causal_lm import build_model


def count_parameters(args: argparse.Namespace) -> int:
    """Parameters of the model that the flags or its configuration describe."""
    if args.model_backend == "transformers":
        if args.hf_config is None:
            return 0  # a task's own model, which nobody has seen yet
        model = build_model(args.hf_config, trust_remote_code=args.trust_remote_code)
        return sum(parameter.numel() for parameter in model.parameters())
    hidden, heads = args.hidden_size, args.num_attention_heads
    head_dim = args.kv_channels or hidden // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    if args.multi_latent_attention:
        query = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
        low, latent = args.q_lora_rank, args.kv_lora_rank
        attention = query * hidden if low is None else low * (hidden + query)
        attention += hidden * (latent + args.qk_pos_emb_head_dim)
        attention += latent * heads * (args.qk_head_dim + args.v_head_dim)
        attention += heads * args.v_head_dim * hidden
    matrices = 3 if args.swiglu or args.quick_geglu else 2
    dense = matrices * hidden * (args.ffn_hidden_size or 4 * hidden)
    layers = args.num_layers
    sparse_layers = 0
    if args.num_experts:
        pattern = args.moe_layer_freq
        sparse_layers = sum(pattern) if isinstance(pattern, list) else layers // pattern
    experts = matrices * hidden * (args.moe_ffn_hidden_size or 0) * (args.num_experts or 0)
    experts += matrices * hidden * (args.moe_shared_expert_intermediate_size or 0)
    embeddings = (args.padded_vocab_size or args.vocab_size or 0) * hidden
    embeddings *= 2 if args.untie_embeddings_and_output_weights else 1
    total = layers * attention + (layers - sparse_layers) * dense + sparse_layers * experts
    return int(total + embeddings)


def checkpoint_bytes(args: argparse.Namespace) -> int:
    """Size of one checkpoint: weights, and master weights with two Adam moments in fp32.

    With FSDP2 the weights are the master weights. With `--lora-rank` it holds factors only.
    """
    weight = 2 if (args.bf16 or args.fp16) and not args.use_torch_fsdp2 else 4
    optimizer = 0 if args.no_save_optim else (12 if args.optimizer == "adam" else 8)
    if args.use_torch_fsdp2:
        optimizer = max(0, optimizer - 4)
    if args.lora is not None:
        targets = chosen_targets(args.hf_config, args.lora)
        return trained_parameters(targets.values()) * (4 + optimizer)
    return count_parameters(args) * (weight + optimizer)


def shown_bytes(count: int) -> str:
    """A size in GiB, or MiB below one, rounded to a tenth."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
