"""The state-space mixer of packed documents: state and convolution begin anew at each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from post_training.batch.packed_documents import PackedDocuments
from post_training.tensors.hybrid import StateSpace

CHUNK = 128
"""Tokens whose scores are held at once."""


def scan(
    x: Tensor, steps: Tensor, rates: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state-space recurrence over one document, chunk by chunk (arXiv 2405.21060, section 6).

    On CUDA by the kernel of `mamba-ssm`, elsewhere by torch.

    With h_t = exp(steps_t rates) h_{t-1} + steps_t x_t b_t, the output is y_t = h_t c_t.

    Args:
        x: float32 [rows, tokens, heads, head_dim].
        steps: above 0: float32 [rows, tokens, heads].
        rates: below 0: float32 [heads].
        b: float32 [rows, tokens, groups, state].
        c: like `b`.
        state: before the first token: float32 [rows, heads, head_dim, state]; None: 0.

    Returns:
        y, like `x`, and the state behind the last token.
    """
    if x.is_cuda:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        found: tuple[Tensor, Tensor] = mamba_chunk_scan_combined(
            x, steps, rates, b, c, CHUNK, initial_states=state, return_final_states=True
        )
        return found
    heads, groups = x.shape[2], b.shape[2]
    outputs = []
    for x_, steps_, b_, c_ in zip(*(t.split(CHUNK, dim=1) for t in (x, steps, b, c)), strict=True):
        decay = (steps_ * rates).cumsum(1)  # [rows, tokens, heads]
        weighted = x_ * steps_.unsqueeze(-1)
        later = torch.ones(x_.shape[1], x_.shape[1], dtype=torch.bool, device=x.device).triu(1)
        between = (decay.unsqueeze(2) - decay.unsqueeze(1)).masked_fill(
            later[None, :, :, None], float("-inf")
        )
        scores = torch.einsum("blgn,bsgn->blsg", c_, b_)
        scores = scores.repeat_interleave(heads // groups, dim=-1) * between.exp()
        y = torch.einsum("blsh,bshp->blhp", scores, weighted)
        b_, c_ = (t.repeat_interleave(heads // groups, dim=2) for t in (b_, c_))
        if state is not None:
            y = y + torch.einsum("blhn,bhpn->blhp", c_ * decay.exp().unsqueeze(-1), state)
        last = decay[:, -1]
        kept = weighted * (last.unsqueeze(1) - decay).exp().unsqueeze(-1)
        added = torch.einsum("blhn,blhp->bhpn", b_, kept)
        state = added if state is None else state * last.exp()[..., None, None] + added
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


class GroupedNorm(MegatronModule):
    """A norm of each group of the gated output, whose weight is split over the tensor parallel group."""

    def __init__(self, config: TransformerConfig, space: StateSpace, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group, self.epsilon = tp_group, space.epsilon
        self.groups = space.groups // tp_group.size()
        self.weight = _split(torch.ones(space.inner // tp_group.size(), dtype=config.params_dtype))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm `y` times silu(`gate`), both [..., width of this rank]."""
        given = y.float() * F.silu(gate.float())
        parts = given.unflatten(-1, (self.groups, -1))
        variance = parts.square().mean(-1, keepdim=True)
        normed = (parts * torch.rsqrt(variance + self.epsilon)).flatten(-2)
        return self.weight * normed.to(gate.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a checkpoint holds: the weight, split."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return found


def _split(values: Tensor) -> torch.nn.Parameter:
    """A parameter of which each tensor parallel rank holds a part."""
    parameter = torch.nn.Parameter(values)
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


class PackedMixer(MambaMixer):
    """Megatron's `MambaMixer` as its checkpoints know it, computed by torch.

    Megatron's own cannot be built without `mamba-ssm`, and runs through the documents of a pack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        *,
        space: StateSpace,
        layer_number: int,
        pg_collection: Any,
        **unused: object,
    ) -> None:
        """Take the arguments Megatron gives its mixer, and `space`, which says what it computes."""
        MegatronModule.__init__(self, config)
        self.space, self.layer_number, self.tp_group = space, layer_number, pg_collection.tp
        ranks = self.tp_group.size()
        # Under Megatron's names, for its `sharded_state_dict`.
        self.d_state, self.headdim = space.state, space.head_dim
        self.nheads_local_tp = space.heads // ranks
        self.d_inner_local_tp = space.inner // ranks
        self.ngroups_local_tp = space.groups // ranks
        shared = space.groups * space.state
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * space.inner + 2 * shared + space.heads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            space.inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )
        rows, dtype = (space.inner + 2 * shared) // ranks, config.params_dtype
        bound = 1 / math.sqrt(space.kernel)
        heads = self.nheads_local_tp
        with get_cuda_rng_tracker().fork():
            kernel = torch.empty(rows, 1, space.kernel, dtype=dtype).uniform_(-bound, bound)
            bias = torch.empty(rows, dtype=dtype).uniform_(-bound, bound)
            # Steps between 0.001 and 0.1, rates between 1 and 16, as Megatron begins.
            first = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
            rates = torch.empty(heads).uniform_(1, 16).log()
        self.conv1d_weight, self.conv1d_bias = _split(kernel), _split(bias)
        self.dt_bias = _split((first + torch.log(-torch.expm1(-first))).to(dtype))
        self.A_log, self.D = _split(rates), _split(torch.ones(heads))
        self.norm = GroupedNorm(config, space, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each document.

        Args:
            hidden_states: [tokens of this rank, batch, hidden].
            inference_context: holds the state while text is generated.
            inference_params: not used.
            packed_seq_params: the documents of a single row; None: each row is one.

        Returns:
            Like `hidden_states`, and no bias.
        """
        projected, _ = self.in_proj(hidden_states)
        projected = projected.transpose(0, 1)
        if packed_seq_params is None:
            mixed = self._mix(projected, inference_context)
        else:
            lengths = packed_seq_params.query_lengths
            assert lengths is not None
            mixed = torch.cat([self._mix(d, None) for d in projected.split(lengths, dim=1)], dim=1)
        out: tuple[Tensor, Tensor | None] = self.out_proj(mixed.transpose(0, 1).contiguous())
        return out

    def _mix(self, projected: Tensor, context: Any) -> Tensor:
        """One document of each row, or its next tokens: [rows, tokens, width of this rank]."""
        shared, inner = self.ngroups_local_tp * self.d_state, self.d_inner_local_tp
        gate, given, steps = projected.split(
            [inner, inner + 2 * shared, self.nheads_local_tp], dim=-1
        )
        kept = {} if context is None else context.key_value_memory_dict
        tail, state = kept.get(("mamba", self.layer_number), (None, None))
        # [rows, channels, tokens]
        given = given.transpose(1, 2)
        padded = (
            F.pad(given, (self.space.kernel - 1, 0))
            if tail is None
            else torch.cat([tail, given], dim=-1)
        )
        convolved = F.conv1d(
            padded, self.conv1d_weight, self.conv1d_bias, groups=self.conv1d_weight.shape[0]
        )
        x, b, c = F.silu(convolved).transpose(1, 2).float().split([inner, shared, shared], dim=-1)
        x = x.unflatten(-1, (self.nheads_local_tp, self.headdim))
        b, c = (part.unflatten(-1, (self.ngroups_local_tp, self.d_state)) for part in (b, c))
        times = F.softplus(steps.float() + self.dt_bias.float()).clamp(*self.space.step_limit)
        y, state = scan(x, times, -self.A_log.float().exp(), b, c, state)
        y = y + self.D.unsqueeze(-1) * x
        if context is not None:
            tail = padded[..., padded.shape[-1] - self.space.kernel + 1 :]
            kept["mamba", self.layer_number] = tail, state
        normed: Tensor = self.norm(y.flatten(-2), gate)
        return normed
