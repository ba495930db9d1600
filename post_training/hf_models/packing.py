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

from post_training.batch.packed_documents import positions_in_documents
from post_training.hf_models.attention import NAME, register

WAYS = ("attention", "positions", "rows")


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
        self.lengths = lengths

    @staticmethod
    def positions(lengths: list[int], device: torch.device) -> Tensor:
        """Position of each token in its document: int64 [1, tokens]."""
        return positions_in_documents(lengths).unsqueeze(0).to(device)


@dataclass(frozen=True)
class Rows:
    """A pack as rows of one document each, padded on the right with the document's last token."""

    tokens: Tensor
    """Which token of the pack stands at each place: int64 [documents, longest]."""
    positions: Tensor
    """int64 [documents, longest]."""
    places: Tensor
    """Where each token of the pack stands, counted through all rows: int64 [tokens]."""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Rows:
        """Lay out documents of these lengths."""
        each = torch.tensor(lengths)
        begins = each.cumsum(0) - each
        longest = int(each.max())
        column = torch.arange(longest).expand(len(lengths), -1)
        tokens = begins.unsqueeze(1) + torch.minimum(column, each.unsqueeze(1) - 1)
        first = torch.arange(len(lengths)) * longest
        places = torch.repeat_interleave(first, each) + positions_in_documents(lengths)
        return cls(*(part.to(device) for part in (tokens, column.contiguous(), places)))
