"""Three ways to keep the documents of a pack apart in a model that knows nothing of packs.

    attention    one row; the model's attention is our own function, document by document; positions
                 begin anew in each document
    positions    one row; the model's own attention, which takes documents to begin where positions do
    rows         a document a row, padded on the right, where nothing looks: needs causality only, and so
                 works for convolutions and recurrent states too

Which one a model keeps to is found out by trying (`probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from post_training.batch.host_tensors import to_device
from post_training.batch.packed_documents import positions_in_documents
from post_training.hf_models.attention import NAME, register

WAYS = ("attention", "positions", "rows")
MOST_CALLS = 4
"""Calls of the model for the rows of one pack: each gathers the weights anew."""
ALIKE = 0.6
"""Documents of a call are at least so long as this part of its longest one."""


class Documents:
    """The documents of the pack that a model is computing; its attention layers look here.

    They stay until the next pass begins, so that a layer that is recomputed in the backward pass sees
    those that it saw.
    """

    def __init__(self, model: Any) -> None:
        """Let the modules of `model` find this object."""
        register()
        self.model = [model]  # in a list: no module of anybody's
        # Pictures are seen by a tower with attention of its own, which nothing here touches.
        self.text = model.config.get_text_config()
        self.stock = str(self.text._attn_implementation)
        self.way: str | None = None
        """The one of `WAYS` that was found to keep documents apart; None: nobody has looked."""
        self.lengths: list[int] | None = None
        self.calls = 0
        self._bounds: dict[tuple[int, ...], Tensor] = {}
        for module in model.modules():
            module.packed_documents = self

    def begin(self, way: str, lengths: list[int] | None) -> None:
        """Announce a pass.

        Args:
            way: how it keeps documents apart; anything but `attention` leaves attention to the model.
            lengths: of the documents of its one row.
        """
        (model,) = self.model
        wanted = NAME if way == "attention" else self.stock
        if self.text._attn_implementation != wanted:
            sees = self.text is not model.config
            model.set_attn_implementation({"text_config": wanted} if sees else wanted)
        self.lengths, self._bounds = lengths, {}

    def bounds(self, lengths: list[int], device: torch.device) -> Tensor:
        """Where pieces of the row begin, and the last ends: int32 [pieces + 1]; made once a pass."""
        found = self._bounds.get(key := tuple(lengths))
        if found is None:
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            found = self._bounds[key] = to_device(ends, device)
        return found

    @staticmethod
    def positions(lengths: list[int], device: torch.device) -> Tensor:
        """Position of each token in its document: int64 [1, tokens]."""
        found: Tensor = to_device(positions_in_documents(lengths).unsqueeze(0), device)
        return found


@dataclass(frozen=True)
class Rows:
    """Documents of a pack as rows, padded on the right with each document's last token."""

    documents: list[int]
    """Which documents of the pack, by number."""
    tokens: Tensor
    """Which token of the pack stands at each place: int64 [documents, longest]."""

    @classmethod
    def of(cls, documents: list[int], lengths: list[int]) -> Rows:
        """Lay out some of the documents of a pack, on the host; none are a row of one token."""
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        each = torch.tensor([lengths[number] for number in documents] or [1])
        begins = bounds[documents] if documents else bounds[:1]
        column = torch.arange(int(each.max())).expand(len(each), -1)
        return cls(documents, begins.unsqueeze(1) + torch.minimum(column, each.unsqueeze(1) - 1))

    @property
    def positions(self) -> Tensor:
        """int64 [documents, longest]."""
        return torch.arange(self.tokens.shape[1]).expand(self.tokens.shape).contiguous()


def by_length(lengths: list[int]) -> list[list[int]]:
    """Documents, by number, in at most `MOST_CALLS` groups, in each of which lengths are alike."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        alike = bool(groups) and lengths[number] >= ALIKE * lengths[groups[-1][0]]
        if alike or len(groups) == MOST_CALLS:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
