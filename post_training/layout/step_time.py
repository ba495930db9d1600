"""Expected time of a step: floating point operations, messages and the pipeline's bubble.

The bubble: D. Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2. Messages of tensor parallel
layers: V. Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.2.2. The two efficiencies are
fitted on three public measurements and held against others in
tests/post_training/layout/test_step_time.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from post_training.errors import SetupError
from post_training.layout.flops import PEAK_FLOPS
from post_training.layout.memory import element_bytes, state_bytes, tokens_and_rows
from post_training.layout.parameters import (
    Sizes,
    is_sparse,
    layer_parameters,
    stage_parameters,
    vocabulary_rows,
)
from post_training.layout.pipeline import divide_layers, virtual_stages

# Of the peak of dense bf16, in matrices as large as those of a model; and of what a link can carry.
COMPUTE_EFFICIENCY = 0.46
LINK_EFFICIENCY = 0.27


@dataclass(frozen=True)
class Device:
    """What a vendor's data sheet says of a device; bandwidths in byte/s in one direction."""

    name: str
    memory: float
    """Bytes that CUDA gives."""
    link: float
    """To the devices of its node."""
    network: float
    """To other nodes, a device's share."""

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.name]


_GIB = 2**30
# NVIDIA's data sheets; memory as torch reports it; a network of one port a device (DGX).
DEVICES = {
    device.name.lower(): device
    for device in (
        Device("A100", 79.2 * _GIB, 300e9, 25e9),
        Device("A800", 79.2 * _GIB, 200e9, 25e9),
        Device("H100", 79.1 * _GIB, 450e9, 50e9),
        Device("H200", 139.8 * _GIB, 450e9, 50e9),
        Device("B200", 178.3 * _GIB, 900e9, 50e9),
        Device("GB200", 184.0 * _GIB, 900e9, 50e9),
    )
}


def step_seconds(
    args: argparse.Namespace,
    device: Device,
    *,
    per_node: int = 8,
    compute: float = COMPUTE_EFFICIENCY,
    link: float = LINK_EFFICIENCY,
) -> float:
    """Seconds of one training step, with packs that are one document each (shorter ones take less).

    Raises:
        SetupError: the formula does not know this kind of run.
    """
    if args.use_torch_fsdp2:
        raise SetupError("--use-torch-fsdp2: how far its messages hide is not known; measure it")
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    dp = args.world_size // (tp * pp * cp)
    micro_batches = max(1, (args.global_batch_size or 0) // (dp * args.micro_batch_size))
    peak = device.peak if element_bytes(args) == 2 else device.peak / 2  # TF32

    def seconds(sent: float, span: int) -> float:
        """Of a message to ranks that lie `span` apart at most."""
        return sent / (link * (device.link if span <= per_node else device.network))

    spans = {"tp": tp, "cp": tp * cp, "ep": tp * cp * dp, "pp": args.world_size}
    times = []
    for number, layers in enumerate(divide_layers(args)):
        operations, messages = _stage_work(args, number, layers)
        time = operations / (compute * peak)
        for kind, sent in messages.items():
            time += seconds(sent, spans[kind])
        times.append(time)
    slowest, mean = max(times), sum(times) / pp
    training = micro_batches * slowest + (pp - 1) * mean / virtual_stages(args)
    if args.lora is None and dp * cp > 1:
        # Gradients are summed and weights given out; overlapped, what the last micro batch cannot hide.
        weight, gradient, _ = state_bytes(args)
        expert_tp = args.expert_tensor_parallel_size or tp
        copies = args.world_size / (pp * expert_tp * args.expert_model_parallel_size)
        held = max(
            each.dense * (1 - 1 / (dp * cp)) + each.expert * (1 - 1 / copies)
            for each in stage_parameters(args)
        )
        one = seconds(held * gradient, args.world_size // pp)
        other = seconds(held * weight, args.world_size // pp)
        training += max(0.0, one - slowest * 2 / 3) if args.overlap_grad_reduce else one
        training += max(0.0, other - slowest / 3) if args.overlap_param_gather else other
    return training


def _stage_work(
    args: argparse.Namespace, number: int, layers: list[int]
) -> tuple[float, dict[str, float]]:
    """Operations of one micro batch on one rank of a stage, and bytes that it sends, by group."""
    sizes, tp, cp = (
        Sizes.of(args),
        args.tensor_model_parallel_size,
        args.context_parallel_size,
    )
    tokens = args.seq_length * args.micro_batch_size / cp
    # Forward, and gradients of input and weight: frozen weights have none; all computed again is one more.
    passes = (2 if args.lora is not None else 3) + (args.recompute_granularity == "full")
    sparse = is_sparse(args)
    element = element_bytes(args)
    width = element * args.hidden_size * tokens
    operations, sent = 0.0, {"tp": 0.0, "cp": 0.0, "ep": 0.0}
    # Activations to the next stage and their gradients back, for every chunk.
    stages, rows = args.pipeline_model_parallel_size, tokens_and_rows(args)[1]
    sent["pp"] = (stages > 1) * 2 * virtual_stages(args) * element * args.hidden_size * rows
    for layer in layers:
        held = layer_parameters(args, sparse=sparse[layer])
        operations += 2 * passes * held.dense * tokens
        # Queries and keys, and scores and values; half of them, for no token sees later ones.
        width_of_scores = (sizes.keys if args.multi_latent_attention else sizes.query) + sizes.value
        again = (args.recompute_granularity is not None) + 3
        operations += again * args.seq_length * tokens * width_of_scores / tp
        # Before each pair of matrices rows are gathered, after it they are spread, both ways; inputs are
        # gathered once more for gradients of weights. Without sequence parallelism outputs are summed.
        times = 8 + 2 * args.sequence_parallel + 4 * (args.recompute_granularity == "full")
        sent["tp"] += times * width * (tp - 1) / tp
        sent["cp"] += 3 * element * 2 * sizes.keys * tokens / tp * (cp - 1)
        if sparse[layer]:
            ep = args.expert_model_parallel_size
            one_of_all = args.moe_router_topk / args.num_experts
            operations += 2 * passes * held.expert * ep * one_of_all * tokens
            sent["ep"] += 2 * passes * width / tp * args.moe_router_topk * (ep - 1) / ep
    if number == stages - 1:
        operations += 6 * vocabulary_rows(args) * args.hidden_size * tokens
    return operations, sent
