"""The endless plan of a split: one epoch's packs after the other, each planned when it is read."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

from data.packs.filling import IntArray, fill_packs
from data.packs.plan import PackingMode, PackingPlan, check_lengths, plan_epoch

_KEPT = 2


@dataclass
class EpochPlans:
    """Plans each epoch once; all that reads a split shares one of these.

    How many packs an epoch has depends on the lengths alone, except with ``sequential``: to find a
    place in the plan nothing has to be planned.

    Attributes:
        lengths: int64 ``[num_documents]``; for the others see ``plan_epoch``.

    Raises:
        DataError: a document is empty or longer than ``seq_length``.
    """

    lengths: IntArray
    seq_length: int
    seed: int
    packing: PackingMode
    shuffle: bool
    balance_every: int | None
    _plans: OrderedDict[int, PackingPlan] = field(default_factory=OrderedDict, init=False)
    _ends: list[int] = field(default_factory=list, init=False)  # of "sequential" epochs

    def __post_init__(self) -> None:
        check_lengths(self.lengths, self.seq_length)

    @cached_property
    def _filled(self) -> tuple[IntArray, int] | None:
        return fill_packs(self.lengths, self.seq_length) if self.packing == "best-fit" else None

    def packs(self, epoch: int = 0) -> int:
        """Packs of an epoch, over all shards."""
        if self.packing == "sequential":
            return self.begin(epoch + 1) - self.begin(epoch)
        return self._filled[1] if self._filled else len(self.lengths)

    def begin(self, epoch: int) -> int:
        """Packs before an epoch."""
        if self.packing != "sequential":
            return epoch * self.packs()
        while len(self._ends) < epoch:
            self._ends.append(self.begin(len(self._ends)) + len(self.plan(len(self._ends))))
        return self._ends[epoch - 1] if epoch else 0

    def locate(self, global_index: int, epochs: int | None) -> tuple[int, int]:
        """(epoch, pack index in it) of a global index; past the end: (epochs, how far past)."""
        epoch = 0 if self.packing == "sequential" else global_index // self.packs()
        if epochs is not None:
            epoch = min(epoch, epochs)
        while epoch != epochs and global_index >= self.begin(epoch + 1):
            epoch += 1
        return epoch, global_index - self.begin(epoch)

    def plan(self, epoch: int) -> PackingPlan:
        """The packs of an epoch."""
        if epoch not in self._plans:
            self._plans[epoch] = plan_epoch(
                self.lengths,
                self.seq_length,
                seed=self.seed,
                epoch=epoch,
                mode=self.packing,
                shuffle=self.shuffle,
                balance_every=self.balance_every,
                begins_at=self.begin(epoch),
                filled=self._filled,
            )
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        return self._plans[epoch]
