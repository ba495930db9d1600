"""From packs of the dataset to what a pipeline stage computes on.

    SFTDataset             input_ids, loss_mask, document_lengths of a pack: [seq_length]
    MicroBatchIterator     the same and groups (sources of tokens): [micro batch, seq_length]
    broadcast              to all ranks of the tensor parallel group, on the host
    row                    A A A A B B B . . C C C C C C . .     packs joined: [tokens]; padding is .
      row_lengths          4       3     2   6           2       padding in pretend documents
      position_ids         0 1 2 3 0 1 2 0 1 0 1 2 3 4 5 0 1
    assemble_batch         labels shifted, PackedDocuments, RoutedDocuments, TrainedTokens: of the row,
                           or of the part that a context parallel rank holds
    to_device              Batch, which `forward_step` computes on

Where a document begins is told by the lengths alone, which travel beside the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from data.packs.pictures import PICTURE_FIELDS
from post_training.batch.context_parallel import ContextParallelCut
from post_training.batch.host_tensors import host_group, to_device
from post_training.batch.packed_documents import (
    PackedDocuments,
    RoutedDocuments,
    row_lengths,
)
from post_training.batch.trained_tokens import TrainedTokens
from post_training.machine.device import current_device

# Fields of a micro batch with an entry for each token.
TOKEN_FIELDS = ("input_ids", "loss_mask", "groups")
# Those with an entry for each document, and 0 behind the last one of a pack.
DOCUMENT_FIELDS = ("document_lengths",)


@dataclass(frozen=True)
class Batch:
    """One micro batch, its packs joined to a single row of `micro batch size * seq_length` tokens.

    Under context parallelism each rank holds its part of the row: `tokens` below are its own.
    """

    tokens: Tensor
    """int64 [1, tokens]."""
    labels: Tensor
    """The next token of each: int64 [1, tokens]."""
    position_ids: Tensor
    """Position inside the document: int64 [1, tokens]."""
    label_mask: Tensor
    """1 where the label is trained, else 0: uint8 [tokens]."""
    packed: PackedDocuments
    trained: TrainedTokens
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Stored features of the tokens by name: [tokens, 1, width] each."""
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    """The fields of `PICTURE_FIELDS`, and `rope_positions` int64 [tokens, 3]; empty without pictures."""


def broadcast_over_tensor_parallel(
    data: dict[str, Tensor] | None, micro_batch_size: int, seq_length: int
) -> dict[str, Tensor]:
    """Give every tensor parallel rank the packs that rank 0 of its group read.

    They stay on the host, where the micro batch is put together without waiting for a GPU.

    Args:
        data: on rank 0: the token and document fields, each [micro batch, seq_length].
        micro_batch_size: packs in a micro batch.
        seq_length: tokens in a pack.

    Returns:
        The fields by name, each int64 [micro batch, seq_length].
    """
    names = TOKEN_FIELDS + DOCUMENT_FIELDS
    # One message a micro batch, of a size that all ranks know: a few kilobytes, dominated by latency.
    shape = (len(names), micro_batch_size, seq_length)
    if data is not None:
        packs = torch.stack([data[name].to(torch.int64) for name in names])
        if packs.shape != shape:
            raise ValueError(f"a micro batch has shape {tuple(packs.shape)}, expected {shape}")
    else:
        packs = torch.empty(shape, dtype=torch.int64)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(packs, source, group=host_group(group))
    return dict(zip(names, packs, strict=True))


def shift_labels(
    tokens: Tensor, loss_mask: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Move tokens and their mask one to the left: the model at a token predicts the next one.

    The last token of a document has no label: the one that follows is another document's.

    Args:
        tokens: int64 [tokens].
        loss_mask: 1 where the token itself is trained, else 0: [tokens].
        lengths: tokens of each document of the row.

    Returns:
        Labels, int64 [tokens], and their mask, uint8 [tokens].
    """
    label_mask = torch.roll(loss_mask, -1).to(torch.uint8)
    label_mask[torch.tensor(lengths).cumsum(0) - 1] = 0
    return torch.roll(tokens, -1), label_mask


def assemble_batch(
    packs: Mapping[str, Tensor],
    *,
    qkv_format: str,
    cp_size: int = 1,
    cp_rank: int = 0,
    experts: bool = False,
    filler: Tensor | None = None,
) -> Batch:
    """Join packs to a row, shift labels and take this context parallel rank's part.

    Args:
        packs: on the host, int64 [micro batch, seq_length] each: the token and document fields.
        qkv_format: `thd` for Transformer Engine, `sbhd` for the local spec and context parallelism.
        cp_size: context parallel size.
        cp_rank: rank in the context parallel group.
        experts: the model routes tokens to experts.
        filler: a document that is put behind the packs and is not trained: int64 [tokens].
    """
    tokens, loss_mask, groups = (packs[name].flatten() for name in TOKEN_FIELDS)
    lengths = row_lengths(packs["document_lengths"])
    if filler is not None and len(filler):
        tokens = torch.cat([tokens, filler])
        loss_mask, groups = (F.pad(row, (0, len(filler))) for row in (loss_mask, groups))
        lengths.append(len(filler))
    # On the whole row: the label of a part's last token may be another rank's.
    labels, label_mask = shift_labels(tokens, loss_mask, lengths)
    groups = torch.roll(groups, -1)
    routed = RoutedDocuments.from_row(lengths, label_mask) if experts else None
    if cp_size == 1:
        packed = PackedDocuments.from_lengths(lengths, qkv_format=qkv_format)
    else:
        cut = ContextParallelCut.make([0, *accumulate(lengths)], size=cp_size, rank=cp_rank)
        tokens, labels, label_mask, groups = (
            row.index_select(0, cut.local_indices) for row in (tokens, labels, label_mask, groups)
        )
        packed = PackedDocuments.from_cut(cut, lengths)
        routed = routed.part(cut.local_indices) if routed is not None else None
    packed.routed = routed
    assert packed.position_ids is not None
    return Batch(
        tokens=tokens.unsqueeze(0),
        labels=labels.unsqueeze(0),
        position_ids=packed.position_ids.unsqueeze(0),
        label_mask=label_mask,
        packed=packed,
        trained=TrainedTokens.from_mask(label_mask, groups),
    )


def read_batch(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    *,
    micro_batch_size: int,
    seq_length: int,
    qkv_format: str,
    experts: bool = False,
    features: Mapping[str, tuple[int, torch.dtype]] | None = None,
) -> Batch:
    """Next micro batch of this data parallel rank, on every tensor parallel rank and pipeline stage.

    All context parallel ranks read the same packs, and each keeps its part.

    Args:
        data_iterator: yields the token and document fields; None except on tensor parallel rank 0.
        micro_batch_size: packs in a micro batch.
        seq_length: tokens in a pack.
        qkv_format: `thd` for Transformer Engine, `sbhd` for the local spec and context parallelism.
        experts: the model routes tokens to experts.
        features: width and dtype of each feature that the packs carry, by name.
    """
    data = next(data_iterator) if data_iterator is not None else None
    packs = broadcast_over_tensor_parallel(data, micro_batch_size, seq_length)
    cp_size = parallel_state.get_context_parallel_world_size()
    cp_rank = parallel_state.get_context_parallel_rank()
    seen = data if data is not None and "filler" in data else None
    batch = assemble_batch(
        packs,
        qkv_format=qkv_format,
        cp_size=cp_size,
        cp_rank=cp_rank,
        experts=experts,
        filler=None if seen is None else seen["filler"],
    )
    if seen is not None:
        pictures = {name: seen[name] for name in PICTURE_FIELDS}
        axes = seen["rope_positions"].flatten(0, 1)
        pictures["rope_positions"] = F.pad(axes, (0, 0, 0, len(seen["filler"])))
        batch = replace(batch, pictures=pictures)
    moved: Batch = to_device(batch, current_device())
    if not features:
        return moved
    tokens = micro_batch_size * seq_length
    rows = {name: _feature(name, tokens, *kind, data) for name, kind in features.items()}
    if cp_size > 1:
        bounds = [0, *accumulate(row_lengths(packs["document_lengths"]))]
        cut = ContextParallelCut.make(bounds, size=cp_size, rank=cp_rank)
        own = to_device(cut.local_indices, current_device())
        rows = {name: row.index_select(0, own) for name, row in rows.items()}
    return replace(moved, features=rows)


def _feature(
    name: str, tokens: int, width: int, dtype: torch.dtype, data: Mapping[str, Tensor] | None
) -> Tensor:
    """One feature of a micro batch on every tensor parallel rank and on its device: [tokens, 1, width]."""
    group = parallel_state.get_tensor_model_parallel_group()
    device = current_device()
    if data is not None:
        row = to_device(data[name].reshape(tokens, 1, width), device)
    else:
        row = torch.empty(tokens, 1, width, dtype=dtype, device=device)
    if group.size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(row, source, group=group)
    return row


def join_stage_input(model: Any) -> None:
    """Let a later pipeline stage see the received `[seq_length, micro batch, hidden]` as one row.

    Megatron's schedule exchanges that shape; packed attention works on `[tokens, 1, hidden]`. Both
    name the same memory, since the sending stage only changed the view (`split_stage_output`).
    """
    received = model.decoder.input_tensor
    if received is not None and received.dim() == 3 and received.shape[1] > 1:
        model.decoder.set_input_tensor(received.view(-1, 1, received.shape[2]))


def split_stage_output(output: Tensor, micro_batch_size: int) -> Tensor:
    """View `[tokens, 1, hidden]` of an earlier pipeline stage as the schedule sends it."""
    if micro_batch_size == 1:
        return output
    return output.view(-1, micro_batch_size, output.shape[2])
