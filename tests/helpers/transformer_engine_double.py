"""Runs a script with Transformer Engine's layers on a machine that has neither it nor a GPU.

    python -m tests.helpers.transformer_engine_double finetune.py FLAG...

In the place of the package stand layers of the same names, arguments, parameters and attributes, computed
by torch. What Megatron derives from them, and the specs that it builds of these, are its own. So a run
shows that weights are read and saved under the names of these layers, that factors find their input and
their ranks, and that the numbers are the same; it says nothing of the package's kernels.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VERSION = "2.20.2"


def _column_input(x: Tensor, layer: Any) -> Tensor:
    """What every rank's rows of a matrix are multiplied with."""
    from megatron.core.tensor_parallel import mappings

    if layer.parallel_mode != "column" or layer.tp_size == 1:
        return x
    if layer.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, group=layer.tp_group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=layer.tp_group)


class Linear(torch.nn.Module):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation and (tp_group is None) == (parallel_mode is None)
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        # None in experts whose messages are the dispatcher's.
        self.tp_group, self.tp_size = tp_group, tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        kind: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **kind))
        init_method(self.weight)
        self._mark(self.weight, int(parallel_mode == "row"), split=parallel_mode is not None)
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, **kind))
            self._mark(self.bias, 0, split=parallel_mode == "column")
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @staticmethod
    def _mark(parameter: Any, axis: int, *, split: bool) -> None:
        parameter.tensor_model_parallel = split
        parameter.partition_dim, parameter.partition_stride = axis, 1

    def get_extra_state(self) -> Tensor:
        """Of scales in 8 bits, of which there are none."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """The same."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """[..., in] to [..., out], and the bias beside it where it is asked for."""
        from megatron.core.tensor_parallel import mappings

        out = functional.linear(_column_input(inp, self), self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            reduce = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            out = reduce(out, group=self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class RMSNorm(torch.nn.Module):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        normalized_shape: int,
        *,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        weight = torch.ones(normalized_shape, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor) -> Tensor:
        """Of the last dimension."""
        return functional.rms_norm(inp.float(), inp.shape[-1:], self.weight.float(), self.eps).to(
            inp.dtype
        )


class LayerNormLinear(Linear):
    """`transformer_engine.pytorch.LayerNormLinear`: what the matrix reads is never seen outside."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm" and not (return_layernorm_output or zero_centered_gamma)
        self.eps = eps
        ones = torch.ones(in_features, dtype=self.weight.dtype, device=self.weight.device)
        self.layer_norm_weight = torch.nn.Parameter(ones)
        self.layer_norm_weight.sequence_parallel = (  # type: ignore[attr-defined]
            self.sequence_parallel
        )

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """The matrix times the norm of `inp`."""
        shape = inp.shape[-1:]
        return super().forward(
            functional.rms_norm(inp, shape, self.layer_norm_weight, self.eps), is_first_microbatch
        )


class GroupedLinear(torch.nn.Module):
    """`transformer_engine.pytorch.GroupedLinear`: all experts of a rank in one call."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        assert not (options["bias"] or options["fuse_wgrad_accumulation"])
        assert options["tp_size"] == 1 and not options.get("single_grouped_weight")
        self.num_gemms, self.fp8, self.fp8_calibration = num_gemms, False, False
        self.fp8_meta, self.use_bias = {"fp8_checkpoint": False}, False
        for number in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(
                    out_features,
                    in_features,
                    dtype=options["params_dtype"],
                    device=options["device"],
                )
            )
            options["init_method"](weight)
            Linear._mark(weight, int(options["parallel_mode"] == "row"), split=True)
            self.register_parameter(f"weight{number}", weight)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is none."""

    def get_extra_state(self) -> Tensor:
        """The same."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """The same."""

    def forward(
        self, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None
    ) -> Tensor:
        """Rows of each expert behind those of the one before."""
        counts = [int(each) for each in m_splits]
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        parts = zip(inp.split(counts), weights, strict=True)
        return torch.cat([functional.linear(rows, weight) for rows, weight in parts])


class DotProductAttention(torch.nn.Module):
    """`transformer_engine.pytorch.DotProductAttention`, of packed documents."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, attention_dropout: float, **options: Any
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        self.scale = options["softmax_scale"]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> Tensor:
        """[tokens, heads, head size] to [tokens, heads * head size]."""
        assert options["qkv_format"] == "thd" and options["attn_mask_type"] == "padding_causal"
        bounds = options["cu_seqlens_q"].tolist()
        assert bounds == options["cu_seqlens_kv"].tolist() and bounds[-1] == len(query)
        parts = []
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            q, k, v = (each[begin:end].transpose(0, 1)[None] for each in (query, key, value))
            grouped = q.shape[1] != k.shape[1]
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    *,
    tensor_format: str,
    fused: bool,
    interleaved: bool,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """`transformer_engine.pytorch.attention.rope`.

    `thd` is [tokens, heads, head size], whose positions begin anew with each document; `sbhd` [tokens,
    batch, heads, head size], of which each position has an angle.
    """
    assert fused and cp_size == 1 and not interleaved
    angles = freqs
    if tensor_format == "thd":
        assert cu_seqlens is not None
        bounds = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
        angles = torch.cat([freqs[:length, 0] for length in lengths])
    else:
        assert tensor_format == "sbhd" and len(freqs) == len(t)
    first, second = t.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return t * angles.cos().to(t.dtype) + turned * angles.sin().to(t.dtype)


class Refused:
    """What Megatron names or derives from, and no run here uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{type(self).__name__}: no run here uses it")


def pretend() -> None:
    """Put the package in; before Megatron is imported."""
    kinds = (Linear, RMSNorm, LayerNormLinear, GroupedLinear, DotProductAttention)
    router = (
        *("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"),
        "fused_topk_with_score_function",
    )
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {"DelayedScaling": Refused},
        "pytorch": {kind.__name__: kind for kind in kinds}
        | {
            "LayerNorm": Refused,
        },
        "pytorch.distributed": {
            "CudaRNGStatesTracker": Refused,
            "activation_recompute_forward": lambda **options: contextlib.nullcontext(),
        },
        "pytorch.fp8": {
            "FP8GlobalStateManager": types.SimpleNamespace(is_fp8_enabled=lambda: False),
            "fp8_autocast": lambda **options: contextlib.nullcontext(),
            "fp8_model_init": lambda **options: contextlib.nullcontext(),
        },
        "pytorch.tensor": {"QuantizedTensor": Refused},
        "pytorch.attention": {},
        "pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
        "pytorch.router": dict.fromkeys(router, Refused),
    }
    for path, content in contents.items():
        name = f"transformer_engine.{path}".removesuffix(".")
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        sys.modules[name] = module
        owner, _, last = name.rpartition(".")
        if owner:
            setattr(sys.modules[owner], last, module)

    from post_training.machine import kernels

    kernels.has_transformer_engine = lambda: True
    kernels.has_packed_kernel = lambda *, fp32: True
    kernels.has_grouped_gemm = lambda: True
    from post_training.platform.cpu import cuda_runtime

    apply = cuda_runtime.apply

    def with_capability() -> None:
        apply()
        # Megatron groups experts on Ampere and later only.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)

    cuda_runtime.apply = with_capability


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    pretend()
    runpy.run_path(sys.argv[0], run_name="__main__")
