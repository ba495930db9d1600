"""The endless plan of a split: one epoch's packs after the other, each planned when it is read."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property

from data.pack_filling import IntArray, fill_packs
from data.packing import PackingMode, PackingPlan, check_lengths, plan_epoch

_KEPT = 2


class EpochPlans:
    """Makes the plan of each epoch once; all that reads a split shares one of these.

    How many packs there are depends on the lengths alone, except with ``sequential``: to know it,
    and with it any place in the plan, no epoch has to be planned.
    """

    def __init__(
        self,
        lengths: IntArray,
        seq_length: int,
        *,
        seed: int,
        packing: PackingMode,
        shuffle: bool,
        balance_every: int | None,
    ) -> None:
        """Take what every epoch is planned from; for the arguments see ``plan_epoch``.

        Raises:
            DataError: a document is empty or longer than ``seq_length``.
        """
        check_lengths(lengths, seq_length)
        self.lengths = lengths
        self.seq_length = seq_length
        self.seed = seed
        self.packing = packing
        self.shuffle = shuffle
        self.balance_every = balance_every
        self._plans: OrderedDict[int, PackingPlan] = OrderedDict()
        self._ends: list[int] = []  # with "sequential": where each known epoch ends

    @cached_property
    def _filled(self) -> tuple[IntArray, int] | None:
        return fill_packs(self.lengths, self.seq_length) if self.packing == "best-fit" else None

    def packs(self, epoch: int = 0) -> int:
        """Packs of an epoch, over all shards."""
        if self.packing == "sequential":
            return self._ends_to(epoch) - self.begin(epoch)
        return self._filled[1] if self._filled else len(self.lengths)

    def begin(self, epoch: int) -> int:
        """Packs before an epoch."""
        if self.packing == "sequential":
            return self._ends_to(epoch - 1) if epoch else 0
        return epoch * self.packs()

    def locate(self, global_index: int, epochs: int | None) -> tuple[int, int]:
        """(epoch, pack index in it) of a global index; past the end: (epochs, how far past)."""
        if self.packing != "sequential":
            epoch = global_index // self.packs()
            if epochs is not None:
                epoch = min(epoch, epochs)
        else:
            epoch = 0
            while epoch != epochs and global_index >= self._ends_to(epoch):
                epoch += 1
        return epoch, global_index - self.begin(epoch)

    def plan(self, epoch: int) -> PackingPlan:
        """The packs of an epoch."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = plan_epoch(
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
            self._plans[epoch] = plan
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        return plan

    def _ends_to(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self.plan(len(self._ends))))
        return self._ends[epoch]
