"""A loss or gradient that is not a number, or infinite, ends the run before the weights see it.

Whether one happened is read off the gradient norm, which Megatron computes over all ranks and copies to
the host once a step anyway: no other collective, and no waiting for the device inside a step. To that
end a loss that is not finite makes its gradient NaN (`StepLosses.keep`). Only then do the ranks tell each
other whose loss it was.

Megatron's own check (`--no-check-for-nan-in-loss-and-grad` switches either off) waits for the device at
every gradient bucket, and ends one rank, without a word about the data, while the others hang.
"""

from __future__ import annotations

import argparse
import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

from data import SFTDataset
from data.documents.provenance import document_place
from data.packs.dataset import with_padding
from post_training.batch.context_parallel import ContextParallelCut
from post_training.checkpoint.saver import finish_pending_save
from post_training.checkpoint.store import latest_checkpoint
from post_training.errors import RunStopped
from post_training.training.loss import step_losses

# Documents that a message names.
NAMED = 8


class BadLoss(NamedTuple):
    """Trained tokens of one micro batch whose loss is not finite, as a rank tells the others."""

    micro_batch: int
    """Counted from 0 in this step."""
    data_parallel_rank: int
    value: float
    """One of the losses: NaN or infinite."""
    places: list[str]
    """The documents that the tokens are of, one line each."""
    is_whole: bool
    """Whether no trained token of the micro batch, of this rank's part of the row, has a finite loss."""


class NonFiniteGuard:
    """Looks at the losses of a step once its gradient norm is known."""

    def __init__(self, args: argparse.Namespace, packs: SFTDataset) -> None:
        """Have losses kept from now on.

        Args:
            args: validated arguments.
            packs: the training data, to name documents.
        """
        self.args, self._packs = args, packs
        step_losses.start()

    def check(self, norm: float) -> None:
        """Look at a step's gradient norm, before the optimizer uses the gradient; on all ranks.

        Raises:
            RunStopped: on every rank, when the norm is not finite.
        """
        seen = step_losses.take()
        if math.isfinite(norm):
            return
        found = [
            self._bad_loss(number, indices.cpu(), losses.cpu())
            for number, (indices, losses) in enumerate(seen)
            if not bool(torch.isfinite(losses).all())
        ]
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, found)
        # The newest checkpoint may still be on its way to the disk.
        failed = finish_pending_save()
        message = self._message(norm, [bad for rank in gathered for bad in rank])
        raise RunStopped(message if failed is None else f"{message}\n{failed}")

    def _bad_loss(self, micro_batch: int, indices: Tensor, losses: Tensor) -> BadLoss:
        rank, length = parallel_state.get_data_parallel_rank(), self._packs.seq_length
        packs = self._pack_numbers(micro_batch, rank)
        bad = ~torch.isfinite(losses)
        places = dict.fromkeys(
            f"  {self._document_at(packs[row // length], row % length)} (pack {packs[row // length]}, "
            f"micro batch {micro_batch + 1} of data parallel rank {rank})"
            for row in self._positions(packs, indices[bad])
        )
        return BadLoss(micro_batch, rank, float(losses[bad][0]), list(places), bool(bad.all()))

    def _positions(self, packs: list[int], indices: Tensor) -> list[int]:
        """Positions in the micro batch's whole row, of which context parallel ranks hold parts."""
        size = parallel_state.get_context_parallel_world_size()
        if size > 1:
            lengths = [
                length
                for pack in packs
                for length in with_padding(self._packs.document_lengths(pack), self.args.seq_length)
            ]
            rank = parallel_state.get_context_parallel_rank()
            cut = ContextParallelCut.make([0, *accumulate(lengths)], size=size, rank=rank)
            indices = cut.local_indices[indices]
        positions: list[int] = indices.tolist()
        return positions

    def _document_at(self, pack: int, position: int) -> str:
        """Where the document of a pack comes from that a position lies in."""
        ends = accumulate(self._packs.document_lengths(pack))
        for document, end in zip(self._packs.document_indices(pack), ends, strict=True):
            if position < end:
                return document_place(self._packs.documents, int(document))
        return "padding"

    def _pack_numbers(self, micro_batch: int, data_parallel_rank: int) -> list[int]:
        """The packs of a micro batch of this step, as numbers in the global plan."""
        args = self.args
        shards, size = args.data_parallel_size, args.micro_batch_size
        first = (args.consumed_train_samples - args.data_begins_at) // shards + micro_batch * size
        return [local * shards + data_parallel_rank for local in range(first, first + size)]

    def _message(self, norm: float, found: list[BadLoss]) -> str:
        args = self.args
        step = args.curr_iteration + 1
        checkpoint = latest_checkpoint(args.save)
        kept = (
            f"the newest checkpoint is {checkpoint.path}"
            if checkpoint
            else "there is no checkpoint of this run yet"
        )
        lines = []
        if found:
            value = found[0].value
            lines.append(f"step {step}: the loss is {value}; the weights were not changed, {kept}")
            lines += _places(found)
        else:
            lines.append(
                f"step {step}: the gradient norm is {norm}, while all losses are finite; the weights "
                f"were not changed, {kept}"
            )
            first = args.consumed_train_samples - args.data_begins_at
            size = args.global_batch_size
            places = sorted(
                document_place(self._packs.documents, int(document))
                for pack in range(first, first + size)
                for document in self._packs.document_indices(pack)
            )
            lines.append(f"  one of packs {first} to {first + size - 1}: {_listed(places)}")
        skipped = " ".join(str(each) for each in [*args.iterations_to_skip, step])
        lines.append(
            f"to continue, give the same command again with --iterations-to-skip {skipped} (leaves this "
            f"batch out), or with a lower --lr; rows that should not be there are best taken out of the "
            f"data, for a run in another --output-dir"
        )
        return "\n".join(lines)


def _places(found: list[BadLoss]) -> list[str]:
    # One row for each document: tensor and context parallel ranks may all have seen it.
    ordered = sorted(found, key=lambda bad: (bad.micro_batch, bad.data_parallel_rank))
    places = list(dict.fromkeys(place for bad in ordered for place in bad.places))
    lines = places[:NAMED]
    if len(places) > NAMED:
        lines.append(f"  and {len(places) - NAMED} more documents")
    if all(bad.is_whole for bad in found) and len(places) > 1:
        lines.append(
            "  no token of these packs has a finite loss: look at the weights and at --lr before the data"
        )
    return lines


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more
