"""A `transformers` model as Megatron's schedule, optimizer and checkpoints take it, packs kept apart."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from post_training.batch.host_tensors import host_group, to_device
from post_training.batch.packed_documents import PackedDocuments
from post_training.batch.trained_tokens import TrainedTokens
from post_training.hf_models.packing import Documents, Rows, by_length
from post_training.hf_models.probe import choose_way
from post_training.hf_models.vision import check_positions, has_three_axes, with_axes


class HFModel(MegatronModule):
    """Stands where a `GPTModel` of one stage stands."""

    pre_process = post_process = True
    chooses_by_topk = True
    """Whether routers may be of any class (`model/router.py`)."""

    def __init__(
        self,
        config: Any,
        model: Any,
        pg_collection: Any,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            config: Megatron's `TransformerConfig` of the run.
            model: a causal language model of `transformers`.
            pg_collection: the run's process groups, which Megatron looks for on the model.
            say: tells the user how documents are kept apart.
        """
        super().__init__(config=config)
        self.model = model
        self.pg_collection = pg_collection
        self._fsdp_modules = unit_classes(model)
        self.documents = Documents(model)
        self._say = say
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._three_axes = has_three_axes(model)
        self._placed = False  # no picture yet
        self._chosen: Tensor | None = None
        self._picked = False
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is no stage before this one."""

    def _pick(self, head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the output layer, leave the trained tokens only: logits are a step's largest tensor."""
        if self._chosen is None or not args:
            return None
        self._picked = True
        return (args[0].flatten(0, -2).index_select(0, self._chosen).unsqueeze(0), *args[1:])

    def run(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        chosen: Tensor | None,
        axes: Tensor | None = None,
        pictures: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of one call of the model.

        Args:
            tokens: int64 [rows, length].
            positions: int64 [rows, length]; None leaves them to the model.
            chosen: of the rows one after the other, which tokens: int64 [chosen]; None: all.
            axes: rotary positions, of a model that has three: int64 [rows, length, 3]; None: of text.
            pictures: what the model takes of pictures, in the order of their tokens.

        Returns:
            [chosen, vocabulary], or [rows, length, vocabulary].
        """
        options: dict[str, Any] = {"use_cache": False, **(pictures or {})}
        if positions is not None and "position_ids" in self._takes:
            options["position_ids"] = with_axes(positions, axes) if self._three_axes else positions
        self._chosen, self._picked = chosen, False
        try:
            logits: Tensor = self.model(input_ids=tokens, **options).logits
        finally:
            self._chosen = None
        if chosen is None:
            return logits
        logits = logits.flatten(0, -2)
        return logits if self._picked else logits.index_select(0, chosen)

    def packed_logits(
        self,
        way: str,
        tokens: Tensor,
        lengths: list[int],
        chosen: Tensor,
        pictures: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of a pack.

        Args:
            way: one of `WAYS`.
            tokens: int64 [tokens].
            lengths: of the pack's documents.
            chosen: which tokens, ascending: int64 [chosen].
            pictures: of a batch (`Batch.pictures`), if it has some.

        Returns:
            [chosen, vocabulary].
        """
        patches = dict(pictures or {})
        axes = patches.pop("rope_positions", None)
        if way != "rows":
            with_positions = self.documents.positions(lengths, tokens.device)
            self.documents.begin(way, lengths)
            axes = None if axes is None else axes.unsqueeze(0)
            return self.run(tokens.unsqueeze(0), with_positions, chosen, axes, patches)
        self.documents.begin(way, None)
        return self._row_logits(tokens, lengths, chosen.cpu(), axes, patches)

    def _row_logits(
        self,
        tokens: Tensor,
        lengths: list[int],
        chosen: Tensor,
        axes: Tensor | None,
        patches: Mapping[str, Tensor],
    ) -> Tensor:
        """The same of documents in rows, those of like length in one call; `chosen` is on the host.

        With pictures there is one call, which has all of them in order.
        """
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        document = torch.searchsorted(bounds, chosen, right=True) - 1
        parts, order = [], []
        groups = [list(range(len(lengths)))] if patches else by_length(lengths)
        # Every rank makes as many calls, some of nothing: each gathers weights from all.
        for group in groups + [[]] * (_most_of_all_ranks(len(groups)) - len(groups)):
            rows = Rows.of(group, lengths)
            row = torch.full((len(lengths),), -1)
            row[group] = torch.arange(len(group))
            here = torch.nonzero(row[document] >= 0).flatten()
            inside = chosen[here] - bounds[document[here]]
            places = row[document[here]] * rows.tokens.shape[1] + inside
            ids, positions, places = (
                to_device(part, tokens.device) for part in (rows.tokens, rows.positions, places)
            )
            own = None if axes is None else axes[ids]
            parts.append(self.run(tokens[ids], positions, places, own, patches))
            order.append(here)
        back = to_device(torch.cat(order).argsort(), tokens.device)
        return torch.cat(parts).index_select(0, back)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: None = None,
        *,
        labels: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
        output_processor: Callable[..., Tensor] | None = None,
        output_processor_context: TrainedTokens | None = None,
        pictures: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The losses of trained tokens, or without labels the logits of rows that are no packs.

        Args:
            tokens: int64 [1, tokens].
            position_ids: int64 [1, tokens].
            attention_mask: as Megatron's models take it; documents and causality are all there is.
            labels: the next token of each: int64 [1, tokens].
            packed_seq_params: the documents.
            output_processor: makes losses of logits (`trained_token_loss`).
            output_processor_context: which tokens are trained.
            pictures: of a batch (`Batch.pictures`), if it has some.

        Returns:
            float32 [trained tokens], or [rows, length, vocabulary].
        """
        if packed_seq_params is None or output_processor is None:
            self.documents.begin("stock", None)
            return self.run(tokens, position_ids, None, pictures=pictures)
        assert labels is not None and output_processor_context is not None
        lengths = packed_seq_params.query_lengths
        assert lengths is not None
        if pictures and not self._placed:
            check_positions(self.model)
            self._placed = True
        if self.documents.way is None:
            self.documents.way = choose_way(self, self._say)
        trained = output_processor_context
        logits = self.packed_logits(
            self.documents.way, tokens[0], lengths, trained.indices, pictures
        )
        return output_processor(
            logits=logits.unsqueeze(1),
            labels=labels,
            context=trained,
            compute_language_model_loss=cross_entropy,
        )


def _most_of_all_ranks(count: int) -> int:
    """The largest of a number of all ranks that share the model."""
    if not parallel_state.is_initialized():
        return count
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        told = torch.tensor(count)
        torch.distributed.all_reduce(
            told, op=torch.distributed.ReduceOp.MAX, group=host_group(group)
        )
        count = int(told)
    return count


def cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """As Megatron's models compute it: labels int64 [1, tokens], logits [tokens, 1, vocabulary]."""
    return F.cross_entropy(logits.squeeze(1).float(), labels[0], reduction="none").unsqueeze(0)


def unit_classes(model: Any) -> list[type]:
    """Classes of the blocks that FSDP2 gathers one at a time.

    Those that the model itself says must not be split; else those of the largest list of like modules. A
    block that holds an embedding is left with the root, which is whole during a pass.
    """
    outside = {
        id(parameter)
        for find in ("get_input_embeddings", "get_output_embeddings")
        if (part := getattr(model, find, lambda: None)()) is not None
        for parameter in part.parameters()
    }
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = {
        type(module)
        for module in model.modules()
        if type(module).__name__ in named
        and module is not model
        and not any(id(parameter) in outside for parameter in module.parameters())
    }
    # Of blocks inside of blocks the outer ones.
    found -= {
        type(part)
        for module in model.modules()
        if type(module) in found
        for part in module.modules()
        if part is not module
    }
    if not found:
        sizes: Counter[type] = Counter()
        for part in model.modules():
            for block in part if isinstance(part, torch.nn.ModuleList) else ():
                sizes[type(block)] += sum(parameter.numel() for parameter in block.parameters())
        found = {kind for kind, _ in sizes.most_common(1)}
    return sorted(found, key=lambda kind: kind.__name__)
