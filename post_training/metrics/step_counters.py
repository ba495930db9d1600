"""What a step worked on, counted where it is known and added up over all ranks once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class StepTotals:
    """Sums over the whole job since the last reduction."""

    trained_tokens: float
    """Tokens with a label."""
    real_tokens: float
    """Tokens of documents, without padding."""
    squared_lengths: float
    """Sum over documents of their squared length, without what sliding windows leave out: what attention
    costs, as a mean over layers."""
    data_seconds: float
    """Mean over the ranks that read data of the seconds they waited for it."""
    loss: float
    """Mean loss of a trained token, in nats; not a number where none was trained."""
    accuracy: float
    """Share of the trained tokens that are the most probable ones; not a number where that is not known."""
    sources: dict[str, tuple[float, float]]
    """Sum of the losses and number of trained tokens of each source, where several are told apart."""
    parts: dict[str, float]
    """Means of what else was counted, by name: not a number where nothing was."""
    experts: ExpertTotals | None = None
    """For models with experts."""
    named: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sum and count of what a task tells, by its own names."""


@dataclass(frozen=True)
class ExpertTotals:
    """What the routers of the layers with experts did."""

    tokens: Tensor
    """Tokens of documents that each expert got: float64 [layers with experts, experts]."""
    auxiliary_loss: float
    """Mean over these layers and over trained tokens of the balance of the token's document (1: even)."""

    @property
    def imbalance(self) -> Tensor:
        """Tokens of the busiest expert over the mean: float64 [layers with experts]; 1 is even."""
        return self.tokens.amax(1) / self.tokens.mean(1)

    @property
    def idle(self) -> int:
        """Experts of all layers that no token went to."""
        return int((self.tokens == 0).sum())


class StepCounters:
    """Counts of this rank; only tensor parallel rank 0 of each group reads data and counts."""

    def __init__(self) -> None:
        self.source_names: list[str] = []
        self.part_names: list[str] = []
        self.gathers_names = False
        """Whether ranks may count what the others have not heard of; every rank must say so alike."""
        self.window = (0, 0.0)
        """Tokens of the sliding window, and the share of the layers that have it."""
        self._expert_shape = (0, 0)
        self.reset()

    def tell_apart(self, source_names: Sequence[str]) -> None:
        """Start again from zero, with the losses of these sources apart; all ranks give the same."""
        self.source_names = list(source_names)
        self.reset()

    def name_parts(self, names: Sequence[str]) -> None:
        """Make room for what a loss is made of; every rank must call it alike."""
        self.part_names = list(names)

    def watch_experts(self, layers: int, experts: int) -> None:
        """Make room for the routers' counts; every rank must call it alike.

        Args:
            layers: of the whole model, with experts or without.
            experts: of a layer.
        """
        self._expert_shape = (layers, experts)

    def reset(self) -> None:
        """Start again from zero."""
        self.real_tokens = 0.0
        self.squared_lengths = 0.0
        self.data_seconds = 0.0
        self.readers = 0.0
        self._losses: Tensor | float = 0.0
        self._right: Tensor | float = 0.0
        self._parts: Tensor | float = 0.0
        self._experts: dict[int, Tensor] = {}
        self._named: dict[str, list[float]] = {}

    def add_documents(self, lengths: Sequence[int]) -> None:
        """Count the documents of one pack by their lengths in tokens."""
        self.readers = 1.0
        self.real_tokens += sum(lengths)
        window, share = self.window
        self.squared_lengths += sum(
            length * length - share * max(0, length - window) ** 2 for length in lengths
        )

    def add_losses(self, losses: Tensor, weights: Tensor, sources: Tensor) -> None:
        """Count the losses of a micro batch, on the last pipeline stage; the device is not waited for.

        Args:
            losses: float32 [trained], times their weights.
            weights: float32 [trained].
            sources: the number of each token's source: int64 [trained].
        """
        # float64: neither sums nor counts of many steps lose a digit that a step's have.
        both = torch.stack([losses, weights]).double()
        columns = len(self.source_names)
        if columns > 1:
            sums = both.new_zeros(2, columns).index_add_(1, sources, both)
        else:
            sums = both.sum(1, keepdim=True)
        self._losses = self._losses + sums

    def add_right(self, right: Tensor) -> None:
        """Count the trained tokens of a micro batch that the model got right; the device is not waited for.

        Args:
            right: float32 [trained], 1 where the label is the most probable token, times the weights.
        """
        self._right = self._right + right.double().sum()

    def add_parts(self, sums: Tensor, counts: Tensor) -> None:
        """Count parts of the losses of a micro batch; the device is not waited for.

        Args:
            sums: [named parts].
            counts: of the tokens that each is a sum over: [named parts].
        """
        self._parts = self._parts + torch.stack([sums, counts]).double()

    def add_named(self, name: str, total: float, count: float) -> None:
        """Count something by a name that need not be announced."""
        sums = self._named.setdefault(name, [0.0, 0.0])
        sums[0] += total
        sums[1] += count

    def _gathered(self) -> dict[str, tuple[float, float]]:
        """What all ranks have counted by name."""
        every: list[Any] = [self._named]
        if self.gathers_names and torch.distributed.is_initialized():
            every = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, self._named)
        names = sorted({name for own in every for name in own})
        return {
            name: (
                sum(own[name][0] for own in every if name in own),
                sum(own[name][1] for own in every if name in own),
            )
            for name in names
        }

    def add_expert_tokens(self, layer: int, tokens: Tensor, balance: Tensor | None) -> None:
        """Count what a router did with a micro batch; the device is not waited for.

        Args:
            layer: number of the layer in the whole model, from 1.
            tokens: tokens of documents for each expert, of this rank: float32 [experts].
            balance: this rank's part of the auxiliary loss, without its coefficient: float32 scalar.
        """
        last = tokens.new_zeros(()) if balance is None else balance
        row = torch.cat([tokens, last.view(1)]).double()
        before = self._experts.get(layer)
        self._experts[layer] = row if before is None else before + row

    def reduce(self, device: torch.device | str) -> StepTotals:
        """Add up over all ranks and start again from zero; every rank must call it.

        Args:
            device: where collectives run.
        """
        names = self.source_names
        columns = max(1, len(names))
        values = torch.zeros(5 + 2 * columns, dtype=torch.float64, device=device)
        host = (self.real_tokens, self.squared_lengths, self.data_seconds, self.readers)
        values[:4] = torch.tensor(host, dtype=torch.float64)
        first_of_group, copies = _copies()
        if isinstance(self._losses, Tensor) and first_of_group:
            # A model that computes its own losses (ModelOpt's draft heads) does not say what was right.
            values[4] = self._right if isinstance(self._right, Tensor) else float("nan")
            values[5:] = self._losses.flatten()
        layers, experts = self._expert_shape
        rows = values.new_zeros(layers, experts + 1)
        for layer, row in self._experts.items():
            rows[layer - 1] = row
        parts = values.new_zeros(2, len(self.part_names))
        if isinstance(self._parts, Tensor) and first_of_group:
            parts += self._parts
        own = len(values)
        values = torch.cat([values, parts.flatten()])
        lone = len(values)
        values = torch.cat([values, rows.flatten()])
        named = self._gathered()
        self.reset()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        values = values.cpu()
        real, squared, seconds, readers, right = values[:5].tolist()
        losses = values[5:own].view(2, columns)
        part_sums, part_counts = values[own:lone].view(2, -1)
        loss, trained = losses.sum(1).tolist()
        # Each token is routed once: by one rank of its layer's stage and tensor parallel group.
        rows = values[lone:].view(layers, experts + 1)
        rows = rows[rows[:, :-1].sum(1) > 0]
        return StepTotals(
            trained_tokens=trained,
            real_tokens=real / copies,
            squared_lengths=squared / copies,
            data_seconds=seconds / max(readers, 1.0),
            loss=loss / trained if trained else float("nan"),
            accuracy=right / trained if trained else float("nan"),
            sources=dict(zip(names, map(tuple, losses.T.tolist()), strict=True)) if names else {},
            parts=dict(zip(self.part_names, (part_sums / part_counts).tolist(), strict=True)),
            experts=ExpertTotals(rows[:, :-1], float(rows[:, -1].mean() / trained))
            if len(rows) and trained
            else None,
            named=named,
        )


def _copies() -> tuple[bool, int]:
    """Whether this rank's losses count, and how many ranks read each pack.

    All of a tensor parallel group have the same losses. Every pipeline stage and context parallel rank
    reads the same packs.
    """
    if not parallel_state.model_parallel_is_initialized():
        return True, 1
    copies = parallel_state.get_pipeline_model_parallel_world_size()
    copies *= parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    copies *= parallel_state.get_context_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank() == 0, copies


counters = StepCounters()
