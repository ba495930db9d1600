"""Runs a base model over documents and stores what distillation needs of it, on any layout.

    shards      of documents, decided by these alone; data parallel ranks take them in turn
    rows        the documents of a shard, put into rows in their order
    stages      each keeps the outputs of its own auxiliary layers, the last one the final hidden states
    writer      tensor parallel rank 0 of the last stage, which is given those of the others

Every rank has the documents, so nothing but hidden states travels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from data.features.writer import FeatureWriter
from post_training.batch.assemble import (
    DOCUMENT_FIELDS,
    TOKEN_FIELDS,
    assemble_batch,
    join_stage_input,
)
from post_training.batch.host_tensors import host_group, to_device
from post_training.distillation.draft_model import base_logits
from post_training.distillation.losses import keep_output, top_tokens
from post_training.machine.device import current_device
from post_training.model.layer_spec import uses_packed_attention


@dataclass
class Row:
    """Documents side by side, of which hidden states are computed at once."""

    lengths: list[int]
    ids: Tensor
    """int64 [seq_length], 0 in padding."""
    mask: Tensor
    """uint8 [seq_length]: 1 where a token is trained."""


def rows_of(documents: Any, numbers: Sequence[int], seq_length: int) -> list[Row]:
    """Put documents into rows in their order; the padding of a row is no document's.

    Args:
        documents: `Documents` or a `DocumentSet`, none longer than `seq_length`.
        numbers: of the documents.
        seq_length: tokens in a row.
    """
    rows: list[Row] = []
    free = 0
    for number in numbers:
        ids, mask = (torch.from_numpy(part.copy()) for part in documents[number])
        if len(ids) > free:
            empty = torch.zeros(seq_length, dtype=torch.int64), torch.zeros(seq_length).byte()
            rows.append(Row([], *empty))
            free = seq_length
        begin = seq_length - free
        rows[-1].ids[begin : begin + len(ids)] = ids
        rows[-1].mask[begin : begin + len(ids)] = mask
        rows[-1].lengths.append(len(ids))
        free -= len(ids)
    return rows


@dataclass
class Kept:
    """What one rank has seen of the rows of a shard, on the host."""

    aux: dict[int, list[Tensor]] = field(default_factory=dict)
    """By layer, of each row: [seq_length, hidden]."""
    final: list[Tensor] = field(default_factory=list)
    top: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Of each row: ids, log-probabilities and that of the rest, at its predicting tokens."""


class Extractor:
    """A base model in evaluation mode that keeps what is asked for."""

    def __init__(
        self,
        args: argparse.Namespace,
        chunks: list[torch.nn.Module],
        *,
        aux_layers: Sequence[int],
        dtype: torch.dtype,
        top_k: int | None,
        hidden_states: bool = True,
    ) -> None:
        """Watch the layers of this stage.

        Args:
            args: validated arguments.
            chunks: this rank's part of the model.
            aux_layers: whose outputs are kept, ascending; -1 is the embedding's.
            dtype: of what is kept.
            top_k: most probable tokens kept at each predicting token; None for none.
            hidden_states: keep them, too.
        """
        self.hidden_states = hidden_states
        self.args, self.chunks, self.dtype, self.top_k = args, chunks, dtype, top_k
        self.aux_layers = list(aux_layers)
        self.kept = Kept()
        (model,) = unwrap_model(chunks)
        self.model: Any = model.eval()
        self._seen: dict[int, Tensor] = {}
        if self.model.pre_process and -1 in self.aux_layers:
            keep_output(self.model.embedding, self._seen, -1)
        for layer in self.model.decoder.layers:
            if layer.layer_number - 1 in self.aux_layers:
                keep_output(layer, self._seen, layer.layer_number - 1)

    def _whole(self, states: Tensor) -> Tensor:
        """Hidden states of all tokens of a row on the host: [seq_length, hidden]."""
        if self.model.config.sequence_parallel:
            states = tensor_parallel.gather_from_sequence_parallel_region(states)
        return states.detach().squeeze(1).to(self.dtype).cpu()

    @torch.no_grad()
    def run(self, rows: Sequence[Row], count: int) -> Kept | None:
        """Compute rows; all ranks of the model must call it with the same ones.

        Args:
            rows: of this data parallel rank.
            count: forward passes, of which those behind the last row compute padding: with experts all data
                parallel ranks need as many.

        Returns:
            On the last stage what was kept of `rows`, else None.
        """
        self.kept = Kept()
        length = self.args.seq_length
        filler = Row([], torch.zeros(length).long(), torch.zeros(length).byte())
        batches = [*rows, *[filler] * (count - len(rows))]
        if batches:
            get_forward_backward_func()(
                forward_step_func=self._step,
                data_iterator=iter(batches),
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=1,
                decoder_seq_length=length,
                forward_only=True,
                collect_non_loss_data=True,
            )
            self._bring_to_last_stage()
        return self.kept if parallel_state.is_pipeline_last_stage() else None

    def _step(self, rows: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        row: Row = next(rows)
        lengths = torch.zeros_like(row.ids)
        lengths[: len(row.lengths)] = torch.tensor(row.lengths, dtype=torch.int64)
        parts = row.ids[None], row.mask.long()[None], torch.zeros_like(row.ids)[None], lengths[None]
        batch = assemble_batch(
            dict(zip(TOKEN_FIELDS + DOCUMENT_FIELDS, parts, strict=True)),
            qkv_format="sbhd" if uses_packed_attention(self.args) else "thd",
        )
        predicts = torch.nonzero(batch.label_mask).flatten()
        batch = to_device(batch, current_device())
        model: Any = unwrap_model(chunk)
        if not model.pre_process:
            join_stage_input(model)
        final = chunk(
            *(batch.tokens, batch.position_ids, None),
            packed_seq_params=batch.packed,
            output_processor=lambda *, hidden_states, **_: hidden_states,
        )
        for number, states in self._seen.items():
            self.kept.aux.setdefault(number, []).append(self._whole(states))
        if model.post_process:
            self._keep_final(final, predicts)
        return final, lambda output, non_loss_data=False: output

    def _keep_final(self, final: Tensor, predicts: Tensor) -> None:
        if self.hidden_states:
            self.kept.final.append(self._whole(final))
        if self.top_k is None:
            return
        if self.model.config.sequence_parallel:
            final = tensor_parallel.gather_from_sequence_parallel_region(final)
        chosen = final.squeeze(1).index_select(0, predicts.to(final.device))
        group = self.model.output_layer.tp_group
        logits = base_logits(self.model, chosen, self.args.vocab_size)
        parts = zip(*(top_tokens(part, self.top_k, group) for part in logits), strict=True)
        ids, values, rest = (torch.cat(part).cpu() for part in parts)
        self.kept.top.append((ids.int(), values, rest))

    def _bring_to_last_stage(self) -> None:
        """Give the last stage what the others have kept, on the host."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return
        group = host_group(parallel_state.get_pipeline_model_parallel_group())
        last = parallel_state.is_pipeline_last_stage()
        every: list[Any] = [None] * group.size()
        torch.distributed.gather_object(
            self.kept.aux, every if last else None, group=group, group_dst=group.size() - 1
        )
        for own in every if last else ():
            self.kept.aux |= own


def fields_of(
    kept: Kept, rows: Sequence[Row], aux_layers: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is written of the rows of a shard, its documents one behind the other: [rows, width] each."""
    real = [slice(0, sum(row.lengths)) for row in rows]

    def joined(states: Sequence[Tensor]) -> Tensor:
        return torch.cat([part[cut] for part, cut in zip(states, real, strict=False)])

    found: dict[str, Tensor] = {}
    if kept.final:
        found["hidden_states"] = joined(kept.final)
        found["aux_hidden_states"] = torch.cat([joined(kept.aux[n]) for n in aux_layers], dim=-1)
    if kept.top:
        ids, values, rest = (torch.cat(parts) for parts in zip(*kept.top[: len(rows)], strict=True))
        found |= {
            "topk_ids": ids,
            "topk_logprobs": values.to(dtype),
            "rest_logprobs": rest.to(dtype),
        }
    return found


def extract(
    extractor: Extractor, writer: FeatureWriter, documents: Any, advance: Callable[[int], None]
) -> None:
    """Write what a folder of features still lacks; every rank must call it.

    Args:
        extractor: the base.
        writer: of one split; every rank has one of the same folder.
        documents: of the split.
        advance: is told how many tokens of this data parallel rank are done.
    """
    of_model = parallel_state.get_model_parallel_group()
    own = own_shards(writer)
    writes = (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )
    every: list[Any] = [None] * of_model.size()
    torch.distributed.all_gather_object(
        every, writer.pending(own) if writes else None, group=of_model
    )
    pending: list[int] = next(answer for answer in every if answer is not None)
    advance(sum(tokens_of(writer, shard) for shard in own if shard not in pending))
    rounds = _most(len(pending))
    for turn in range(rounds):
        shard = pending[turn] if turn < len(pending) else None
        numbers = [] if shard is None else writer.documents_of(shard)
        rows = rows_of(documents, numbers, extractor.args.seq_length)
        kept = extractor.run(rows, _most(len(rows)))
        if shard is None:
            continue
        if writes:
            assert kept is not None
            writer.write(shard, fields_of(kept, rows, extractor.aux_layers, extractor.dtype))
        advance(tokens_of(writer, shard))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        writer.finish()
    torch.distributed.barrier()


def own_shards(writer: FeatureWriter) -> range:
    """The shards of this data parallel rank."""
    ranks = parallel_state.get_data_parallel_world_size()
    return range(parallel_state.get_data_parallel_rank(), len(writer), ranks)


def tokens_of(writer: FeatureWriter, shard: int) -> int:
    """Tokens of the documents of a shard."""
    numbers = writer.documents_of(shard)
    return int(writer.documents.lengths[numbers.start : numbers.stop].sum())


def _most(count: int) -> int:
    """The largest over all ranks."""
    most = torch.tensor([count], device=current_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)
