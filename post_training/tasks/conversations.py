"""What is trained without `--task`, conversations with and without pictures, in a task's three methods.

To be built upon: a class that replaces one method has another loss, or another count of what is right, with
the same formats, templates, masks and pictures. A row is one document here; packs are the run's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Documents, SFTDataset
from data.errors import DataError
from data.packs.pictures import PictureDataset
from data.prepare.splits import DataSplit, prepare_documents_from_args
from post_training.batch.splits import SPLITS, packs_of
from post_training.tasks.task import SFTTask


class Conversations(SFTTask):
    """Answers of a model of `transformers`, by the flags of data."""

    uses_data_flags = True

    def build_dataloader(self, data_paths: Sequence[str], eval_dataset: bool = False) -> Any:
        """Documents, and what makes a padded batch of them.

        Args:
            data_paths: those of one split's flag.
            eval_dataset: whether it is one of the splits that are evaluated.

        Returns:
            `(dataset, collate_fn)`. A batch has `input_ids` int64 and `attention_mask` [rows, longest];
            `loss_mask` bool [rows, longest], true where a token is trained; and what pictures need.

        Raises:
            DataError: the data or the flags have to be put right.
        """
        split: DataSplit = "train"
        if eval_dataset:
            given = {
                name: list(getattr(self.cfg, f"{name}_data_files") or ()) for name in SPLITS[1:]
            }
            split = next(name for name, paths in given.items() if paths == list(data_paths))
        documents = prepare_documents_from_args(self.cfg, split, self.tokenizer)
        if not isinstance(documents, Documents):
            raise DataError(
                f"{' '.join(data_paths)}: rows of a task have no weights. Leave them out."
            )
        rows = packs_of(self.cfg, split, documents, self.tokenizer)(
            None,
            tokenizer=self.tokenizer,
            seq_length=self.cfg.seq_length,
            packing="none",
            shuffle=False,
        )
        return rows, functools.partial(collate, rows)

    def get_train_model_output(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the losses of a batch's trained tokens, and how many they are."""
        logits, labels = self.predictions(batch)
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels)

    def get_eval_model_output(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """How many of a batch's trained tokens are the likeliest, and how many there are."""
        logits, labels = self.predictions(batch)
        return (logits.argmax(-1) == labels).sum(), len(labels)

    def predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the model says of a batch's trained tokens.

        Returns:
            Logits, float32 [trained, vocabulary], and the tokens themselves, int64 [trained].
        """
        inputs = dict(batch)
        trained = inputs.pop("loss_mask")[:, 1:]
        logits = self.model(**inputs, use_cache=False).logits[:, :-1]
        return logits[trained].float(), batch["input_ids"][:, 1:][trained]


def collate(dataset: SFTDataset, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of documents, as `Conversations.build_dataloader` says."""
    lengths = torch.tensor([int(row["document_lengths"][0]) for row in rows])
    ids = torch.stack([row["input_ids"] for row in rows])
    mask = torch.stack([row["loss_mask"] for row in rows])
    seen: dict[str, Tensor] = {}
    if isinstance(dataset, PictureDataset):
        seen = dataset.join(rows)
        axes, filler = seen.pop("rope_positions"), seen.pop("filler")
        if len(filler):  # a row that is not trained, so that every rank computes the same layers
            lengths = torch.cat([lengths, torch.tensor([len(filler)])])
            ids, mask, axes = (
                F.pad(each, (0, 0) * (each.dim() - 1) + (0, 1)) for each in (ids, mask, axes)
            )
            ids[-1, : len(filler)] = filler
    longest = int(lengths.max())
    places = torch.arange(longest)
    batch = {
        "input_ids": ids[:, :longest],
        "attention_mask": (places < lengths[:, None]).long(),
        "loss_mask": mask[:, :longest].bool(),
    }
    if seen:
        axes = axes[:, :longest]
        batch["position_ids"] = axes.permute(2, 0, 1)
    return {**batch, **seen}
