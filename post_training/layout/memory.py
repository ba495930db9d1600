"""Peak memory of a step on each pipeline stage, from the flags alone: nothing is built or measured.

Sources of the terms. Bytes a parameter: Megatron's `core/optimizer/`. What a layer keeps for its backward
pass: V. Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.1, written out here for gated and
grouped layers, and flash attention, which keeps no scores. Micro batches in flight: D. Narayanan et al.,
https://arxiv.org/abs/2104.04473, section 2.2, and Megatron's
`core/pipeline_parallel/schedules.py`. Held against public measurements in
tests/post_training/layout/test_memory.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from post_training.errors import SetupError
from post_training.layout.parameters import (
    Parameters,
    Sizes,
    adapter_parameters,
    is_sparse,
    stage_parameters,
    vocabulary_rows,
)
from post_training.layout.pipeline import divide_layers, virtual_stages
from post_training.layout.sizes import data_parallel_size

# Of everything that no formula tells: the CUDA context, NCCL's channels, and what the allocator cannot
# join again (with expandable segments). Not part of what torch calls allocated.
CONTEXT_BYTES = 2 * 2**30
FRAGMENTATION = 0.04


DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the peak of a step on one rank of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    """Weight gradients and other tensors that live for one layer, or that kernels keep for all."""

    @property
    def states(self) -> float:
        """What lies there between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` is to say."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def needed(self) -> float:
        """What a device must have."""
        return self.allocated * (1 + FRAGMENTATION) + CONTEXT_BYTES


def check_known(args: argparse.Namespace) -> None:
    """Refuse to speak about what the formula does not know.

    Raises:
        SetupError: naming the flag.
    """
    if args.model_backend == "transformers":
        raise SetupError(
            "--model-backend transformers: memory cannot be foretold (what a layer keeps is up to the "
            "model's own code); measure it"
        )
    for name, why in (
        ("fp8", "what Transformer Engine keeps in fp8 depends on its recipe"),
        ("fp4", "what Transformer Engine keeps in fp4 depends on its recipe"),
        ("cpu_offloading_num_layers", "how much of the activations has left is not known"),
        ("fine_grained_activation_offloading", "how much of the activations has left is not known"),
        ("mtp_num_layers", "layers of multi-token prediction are not counted"),
        ("hybrid_layer_pattern", "what state-space layers keep is not counted"),
        ("draft", "a draft beside the model is not counted"),
        ("task", "the model of a task is its own"),
        ("export_quant_cfg", "what rounding keeps of activations is not counted"),
        ("export_kd_teacher_load", "a teacher beside the model is not counted"),
    ):
        if getattr(args, name, None):
            flag = {"fp8": "fp8-format", "fp4": "fp4-format"}.get(name, name.replace("_", "-"))
            flag = f"--hf-model {args.hf_model}" if name == "hybrid_layer_pattern" else f"--{flag}"
            raise SetupError(f"{flag}: memory cannot be foretold ({why}); measure it")


def state_bytes(args: argparse.Namespace) -> tuple[float, float, float]:
    """Bytes of a trained parameter's weight, of its gradient and of its optimizer state."""
    half = args.bf16 or args.fp16
    moments = 8.0 if args.optimizer == "adam" else 4.0
    if args.use_torch_fsdp2 or args.lora is not None:
        # fp32 weights are their own master copies (`platform/fsdp2.py`, `adapters/layers.py`).
        return 4.0, 4.0, moments
    gradient = 2.0 if half and args.grad_reduce_in_bf16 else 4.0
    states = (4.0 if half else 0.0) + moments
    if args.use_precision_aware_optimizer:
        kinds = (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype)
        states = float(sum(DTYPE_BYTES[str(kind)] for kind in kinds))
    if args.optimizer_cpu_offload:
        states *= 1 - args.optimizer_offload_fraction
    return (2.0 if half else 4.0), gradient, states


def element_bytes(args: argparse.Namespace) -> float:
    """Of an activation."""
    half = args.bf16 or args.fp16 or getattr(args, "fsdp_compute_dtype", None) is not None
    return 2.0 if half else 4.0


def tokens_and_rows(args: argparse.Namespace) -> tuple[float, float]:
    """Tokens of a micro batch on one rank, inside of the cut matrices and outside of them."""
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    return tokens, tokens / (args.tensor_model_parallel_size if args.sequence_parallel else 1)


def layer_activations(args: argparse.Namespace, *, sparse: bool) -> float:
    """Bytes that one layer keeps of one micro batch until its backward pass, on one rank."""
    sizes, hidden, tp = Sizes.of(args), args.hidden_size, args.tensor_model_parallel_size
    element, (tokens, rows) = element_bytes(args), tokens_and_rows(args)
    selective = args.recompute_granularity == "selective"
    again = set(args.recompute_modules or ()) if selective else set()
    # Inputs of both norms, and what they give to the matrices.
    kept = element * (2 if "layernorm" in again else 4) * hidden * rows
    if args.hidden_dropout:
        kept += 2 * hidden * rows  # masks of bytes
    attention = sizes.query + 2 * sizes.keys + sizes.value
    if args.multi_latent_attention:
        kept += element * 2 * sizes.latent * rows
        # The up-projections' outputs, which queries and keys with positions are put together from.
        attention = 2 * sizes.query + sizes.keys + 2 * sizes.value
        if "mla_up_proj" in again:
            attention -= sizes.query + sizes.value
    elif args.position_embedding_type == "rope" and args.transformer_impl == "local":
        attention += (
            sizes.query + sizes.keys
        )  # turned ones beside those that the values are a view of
    kept += element * attention * tokens / tp
    if args.context_parallel_size > 1:
        kept += element * _context_copies(args, sizes) * tokens / tp
    if not sparse:
        if "mlp" not in again:
            kept += element * (sizes.gate + 1) * sizes.feed_forward * tokens / tp
        return kept
    if "moe" in again:
        return kept
    kept += 4 * args.num_experts * rows * 2  # the router's logits and probabilities, in fp32
    if "shared_experts" not in again:
        kept += element * (sizes.gate + 1) * sizes.shared * tokens / tp
    # Balanced: each rank's experts see as many tokens as it sends. Inputs, outputs, and what is between.
    expert_tp = args.expert_tensor_parallel_size or tp
    sent = rows * args.moe_router_topk * (1 if args.sequence_parallel else 1 / tp)
    inner = (sizes.gate + ("moe_act" not in again)) * sizes.expert
    return kept + element * sent * (2 * hidden + inner * (tp / expert_tp if expert_tp > tp else 1))


def _context_copies(args: argparse.Namespace, sizes: Sizes) -> float:
    """Elements a token that attention keeps under context parallelism beside its own tokens' tensors."""
    kinds = args.cp_comm_type
    if "a2a" in kinds:
        return sizes.value  # its output before it goes back to the ranks of the tokens
    return 2 * sizes.keys * (args.context_parallel_size - 1)  # everybody's keys and values


def in_flight(args: argparse.Namespace, stage: int) -> float:
    """Micro batches whose layers of a stage wait for their backward pass at its peak.

    Parts of one under the interleaved schedule, where a chunk is a part of a stage's layers.
    """
    pp, chunks = args.pipeline_model_parallel_size, virtual_stages(args)
    one = data_parallel_size(args) * args.micro_batch_size
    there = max(1, (args.global_batch_size or one) // one)
    if chunks == 1:
        return min(there, pp - stage)
    group = args.microbatch_group_size_per_vp_stage or pp
    warm = 2 * (pp - stage - 1) + (chunks - 1) * group
    return min(there * chunks, warm + 1) / chunks


def stage_memory(args: argparse.Namespace) -> list[StageMemory]:
    """The peak on each pipeline stage.

    Args:
        args: arguments with every size, as after `parse_arguments`; `world_size` is the number of devices.

    Raises:
        SetupError: a flag that the formula does not know.
    """
    check_known(args)
    whole = stage_parameters(args)
    trained = whole if args.lora is None else adapter_parameters(args)
    weight, gradient, optimizer = state_bytes(args)
    pp, tp = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    ranks = args.world_size / (tp * pp)  # data and context parallel
    expert_tp = args.expert_tensor_parallel_size or tp
    expert_ranks = args.world_size / (pp * expert_tp * args.expert_model_parallel_size)
    sharded = args.use_torch_fsdp2 and args.fsdp_sharding == "full"
    shards = ranks if sharded else 1.0
    element, (tokens, rows) = element_bytes(args), tokens_and_rows(args)
    sparse = is_sparse(args)
    found = []
    for number, layers in enumerate(divide_layers(args)):
        own = trained[number]
        cut = sharded or args.use_distributed_optimizer
        states = own.dense / (ranks if cut else 1) + own.expert / (expert_ranks if cut else 1)
        frozen = whole[number].total if args.lora is not None else 0.0
        kept = [layer_activations(args, sparse=sparse[layer]) for layer in layers]
        logits = 0.0
        if number == pp - 1:
            table = vocabulary_rows(args) * args.hidden_size
            # fp32 and bf16 ones; Transformer Engine overwrites the latter with their gradients.
            in_place = args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te"
            logits = tokens * vocabulary_rows(args) * (element if in_place else element + 4.0)
            logits += element * (
                0 if frozen else table
            )  # the gradient of the output layer's weight
            logits += 2 * element * args.hidden_size * rows  # in and out of the last norm
        found.append(
            StageMemory(
                weights=element * frozen / shards + weight * own.total / shards,
                gradients=gradient * own.total / shards,
                optimizer=optimizer * states,
                activations=in_flight(args, number) * recomputed(args, kept),
                logits=logits,
                buffers=_buffers(args, kept, whole[number]),
            )
        )
    return found


def recomputed(args: argparse.Namespace, layers: Sequence[float]) -> float:
    """Bytes that a stage keeps of one micro batch, where some of its layers keep their input only.

    Args:
        args: arguments.
        layers: what each would keep.
    """
    if args.recompute_granularity != "full":
        return sum(layers)
    given = element_bytes(args) * args.hidden_size * tokens_and_rows(args)[1]
    number = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        return min(number, len(layers)) * given + sum(layers[number:])
    return math.ceil(len(layers) / number) * given


def _buffers(args: argparse.Namespace, layers: Sequence[float], held: Parameters) -> float:
    """Bytes that live for one layer, or that kernels keep for all of them.

    Transformer Engine keeps a weight gradient of every shape of matrix for good where it adds into the
    gradient buffer itself (`get_dummy_wgrad` of its module/base.py); else the largest lives for a moment.
    """
    sizes, hidden, tp = Sizes.of(args), args.hidden_size, args.tensor_model_parallel_size
    inner = sizes.gate * sizes.feed_forward
    shapes = {
        hidden * (sizes.query + 2 * sizes.keys),
        hidden * sizes.value,
        hidden * inner,
        hidden * sizes.feed_forward,
    }
    fused = args.transformer_impl == "transformer_engine" and args.gradient_accumulation_fusion
    if args.lora is not None:
        shapes = {0}
    # The gradient of what is between a feed-forward layer's matrices, and those of the matrices.
    tokens = tokens_and_rows(args)[0]
    buffers = element_bytes(args) * (sum(shapes) if fused else max(shapes)) / tp
    buffers += element_bytes(args) * tokens * inner / tp
    if args.recompute_granularity == "full" and layers:
        number = 1 if args.recompute_method == "block" else args.recompute_num_layers or 1
        buffers += max(layers) * min(number, len(layers))
    if args.use_torch_fsdp2 and args.fsdp_sharding == "full":
        # A unit and the next one, whole; and the gradient of one, also in fp32 to be summed, if it has any.
        unit = max(held.total / max(1, len(layers)), hidden * vocabulary_rows(args))
        buffers += unit * (2 * element_bytes(args))
        buffers += unit * (element_bytes(args) + 4) if args.lora is None else 0
    return buffers
