"""Core attention of the local layer spec: packed documents, grouped queries, CPU and CUDA."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from post_training.batch.packed_documents import PackedDocuments


class PackedAttention(MegatronModule):
    """Causal attention in which no document of a pack sees another.

    Stands where Megatron's `DotProductAttention` stands in the local spec, which refuses packed
    sequences and builds the whole `[heads, tokens, tokens]` score matrix. Cost here grows with the sum
    of squared document lengths:

    - on CUDA in bf16 and fp16, one variable-length flash kernel over all documents;
    - elsewhere (CPU, fp32, attention sinks), scaled-dot-product attention document by document; with sinks
      it holds the scores of one document at a time.

    Under context parallelism the keys and values of the whole row are gathered from the group, and each
    piece of this rank's tokens attends to its own document up to itself (`ContextParallelCut`).

    Without packed documents (generation with a key/value cache) it is plain attention, causal while the
    prompt is read.

    In layers with a sliding window a query sees the last tokens of its document only. With attention sinks
    (`--softmax-type learnable`) each head has a score of its own to which no value belongs.
    """

    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        """Take the arguments Megatron gives every core attention."""
        super().__init__(config=config)
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        # Tokens that a query sees, itself among them; Megatron counts those before it.
        self.window = 1 + config.window_size[0] if windowed and config.window_size else None
        self.register_parameter("softmax_offset", None)
        if config.softmax_type == "learnable":
            self.tp_group = pg_collection.tp
            heads = config.num_attention_heads // self.tp_group.size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_parallel_group = getattr(pg_collection, "cp", None)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a checkpoint holds: the sinks, split by heads."""
        if self.softmax_offset is None:
            return {}
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [query tokens, batch, heads of this rank, head_dim].
            key: [key tokens, batch, key/value heads of this rank, head_dim].
            value: like `key`.
            attention_mask: not used: documents and causality are all there is.
            attn_mask_type: `no_mask` while generating after the prompt, else causal.
            attention_bias: not supported.
            packed_seq_params: the documents; the batch dimension is then 1.

        Returns:
            [query tokens, batch, heads of this rank * head_dim].

        Raises:
            ValueError: an attention bias is given.
        """
        if attention_bias is not None:
            raise ValueError("attention bias is not supported by the local attention")
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is None:
            # A step after the prompt has one query token, which may see every key.
            causal = attn_mask_type != AttnMaskType.no_mask and query.shape[0] > 1
            out = self._dense(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                causal,
                dropout,
            )
            return out.permute(2, 0, 1, 3).flatten(2)
        if packed_seq_params.key_indices is not None:
            key, value = self._gather(key, value, packed_seq_params.key_indices)
        by_kernel = query.is_cuda and query.dtype != torch.float32 and dropout == 0.0
        if by_kernel and self._kernel_can():
            return self._varlen(query, key, value, packed_seq_params)
        queries, keys = packed_seq_params.query_lengths, packed_seq_params.key_lengths
        assert queries is not None and keys is not None
        # [tokens, 1, heads, dim] -> [1, heads, tokens, dim], split into documents: views only.
        rows = [
            x.permute(1, 2, 0, 3).split(lengths, dim=2)
            for x, lengths in ((query, queries), (key, keys), (value, keys))
        ]
        parts = [
            self._dense(q, k, v, True, dropout).permute(2, 0, 1, 3)
            for q, k, v in zip(*rows, strict=True)
        ]
        return torch.cat(parts).flatten(2)

    def _gather(self, key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every piece, chosen from those of all context parallel ranks.

        The backward pass adds up what all ranks' queries say of a key, and gives each rank its own.
        """
        # Keys and values travel side by side, in one message.
        both = tensor_parallel.gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), group=self.context_parallel_group
        )
        chosen = both.index_select(0, indices)
        return chosen[..., : key.shape[-1]], chosen[..., key.shape[-1] :]

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout: float
    ) -> Tensor:
        """Scaled-dot-product attention on [batch, heads, tokens, head_dim].

        `causal` lets the last query see every key of its window, and each one before it one key less.
        """
        if self.window is not None and not causal:
            key, value = key[:, :, -self.window :], value[:, :, -self.window :]
        queries, keys = query.shape[2], key.shape[2]
        windowed = causal and self.window is not None and keys > self.window
        mask: Tensor | None = None
        if windowed or self.softmax_offset is not None or (causal and queries != keys):
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            if causal:
                mask = mask.tril(keys - queries)
            if windowed and self.window is not None:
                mask = mask.triu(keys - queries - self.window + 1)
        if self.softmax_offset is not None and mask is not None:
            # One more key, whose score is the sink and whose value is 0.
            scores = query.new_zeros(queries, keys).masked_fill(~mask, float("-inf"))
            sinks = self.softmax_offset.to(query.dtype).view(1, -1, 1, 1)
            both = (scores.expand(1, query.shape[1], -1, -1), sinks.expand(-1, -1, queries, 1))
            mask = torch.cat(both, dim=-1)
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and query.is_cuda and (query.dtype == torch.float32 or mask is not None):
            # Only CUDA's flash kernel takes grouped heads, and it takes neither fp32 nor a mask: torch
            # would keep the whole score matrix. Its memory-efficient kernel wants them repeated.
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        # Tensor parallel ranks hold different heads: each drops from a random state of its own. With
        # sequence parallelism the whole layer runs under that state already.
        own_state = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_state else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

    def _kernel_can(self) -> bool:
        """Whether torch's variable-length kernel knows what this layer asks for."""
        from torch.nn.attention.varlen import varlen_attn

        if self.window is not None and "window_size" not in _keywords(varlen_attn):
            return False
        return self.softmax_offset is None

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments) -> Tensor:
        """The variable-length flash kernel of torch on [tokens, heads, head_dim]."""
        from torch.nn.attention.varlen import varlen_attn

        takes = _keywords(varlen_attn)
        groups = query.shape[2] // key.shape[2]
        if groups > 1 and "enable_gqa" not in takes:
            key = key.repeat_interleave(groups, dim=2)
            value = value.repeat_interleave(groups, dim=2)
        width = value.shape[-1]
        value = F.pad(value, (0, key.shape[-1] - width))
        options: dict[str, Any] = {"is_causal": True}
        if "window_size" in takes:
            options = {"window_size": (-1 if self.window is None else self.window - 1, 0)}
        if groups > 1 and "enable_gqa" in takes:
            options["enable_gqa"] = True
        if "scale" in takes:
            options["scale"] = self.softmax_scale
        else:
            query = query * (self.softmax_scale * math.sqrt(query.shape[-1]))
        out = varlen_attn(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            **options,
        )
        assert isinstance(out, Tensor)
        return out[..., :width].flatten(1).unsqueeze(1)


@functools.cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's arguments: those of the kernel have changed between releases of torch."""
    return frozenset(inspect.signature(function).parameters)
