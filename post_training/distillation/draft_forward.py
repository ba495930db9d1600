"""EAGLE-3 drafts on packed documents: ModelOpt builds the module and keeps its state, the forward is here.

    query q    reads the embedding of token q + 1 + t and, normed apart, what step t - 1 made of q (step 0:
               the features, `fc` of the base's auxiliary hidden states at q); its position is q + t
    predicts   token q + 2 + t, as the base model does at q + 1 + t
    loss       KL(base || draft) where the answer mask trains token q + 2 + t, if q is in its document

So the steps of training are those of a server that drafts (`draft_attention`). No step is detached from the
one before, which ModelOpt's own forward does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from post_training.batch.host_tensors import to_device
from post_training.batch.packed_documents import PackedDocuments
from post_training.batch.trained_tokens import TrainedTokens
from post_training.distillation.draft_attention import rotated, step_attention
from post_training.distillation.draft_model import DraftSettings, base_logits, teacher_rows
from post_training.distillation.losses import divergence, keep_output
from post_training.metrics.step_counters import counters
from post_training.training.loss import hide_vocabulary_padding, largest_tokens


@dataclass(frozen=True)
class BaseStates:
    """What a draft reads of its base model, of one row of tokens."""

    aux_hidden_states: Tensor
    """Outputs of the auxiliary layers side by side, of this rank's tokens under sequence parallelism:
    [tokens, 1, 3 * hidden]."""
    hidden_states: Tensor
    """After the final norm, of all tokens of the row: [tokens, 1, hidden]."""


def base_states(model: GPTModel, layers: Sequence[int], *inputs: Any, **options: Any) -> BaseStates:
    """Run a frozen base model and keep what a draft reads of it.

    Args:
        model: the whole of it, with or without a draft.
        layers: the auxiliary ones, ascending; -1 is the embedding.
        inputs: as `GPTModel.forward` takes them.
        options: likewise.
    """
    seen: dict[int, Tensor] = {}
    handles = [
        keep_output(model.embedding if n < 0 else model.decoder.layers[n], seen, n) for n in layers
    ]
    for part in (model.embedding, model.decoder):
        part.eval()
    try:
        with torch.no_grad():
            final: Tensor = GPTModel.forward(
                model,
                *inputs,
                **options,
                output_processor=lambda *, hidden_states, **_: hidden_states,
            )
    finally:
        for handle in handles:
            handle.remove()
    if model.config.sequence_parallel:
        final = tensor_parallel.gather_from_sequence_parallel_region(final)
    return BaseStates(torch.cat([seen[number] for number in layers], dim=-1), final)


class DraftForward:
    """The losses of one draft over a micro batch."""

    def __init__(self, settings: DraftSettings) -> None:
        self.settings = settings
        self._teacher: Tensor | None = None

    def losses(
        self,
        model: GPTModel,
        tokens: Tensor,
        packed: PackedDocuments,
        trained: TrainedTokens,
        states: BaseStates,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All test-time steps of a row.

        Args:
            model: unwrapped.
            tokens: int64 [1, tokens].
            packed: the documents of the row.
            trained: positions whose next token is trained.
            states: of the base model.

        Returns:
            KL, float32 [steps, trained]; which of them count, 0 or 1, the same shape; and which drafts are
            what the base model would write, likewise.
        """
        positions = packed.position_ids
        assert positions is not None
        if self._teacher is None:
            self._teacher = teacher_rows(model)
        teacher, greedy = self._teacher_logits(model, states.hidden_states, trained)
        losses, counted, right = [], [], []
        place = positions.index_select(0, trained.indices)
        steps = self._steps(
            model, states.aux_hidden_states, packed, lambda step: tokens.roll(-(1 + step), dims=1)
        )
        for step, hidden in enumerate(steps):
            # The query that predicts the label of `r` at this step is `1 + step` tokens before `r`.
            queries = (trained.indices - (1 + step)).clamp(min=0)
            chosen = self._chosen(model, hidden, queries)
            # Logits, by far the largest tensors, are those of one step at a time: the backward pass makes
            # them again.
            loss, choice = checkpoint(
                *(self._compared, model, chosen, teacher),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            losses.append(loss)
            counted.append(trained.weights * (place > step))
            right.append((choice == greedy) * counted[-1])
        return torch.stack(losses), torch.stack(counted), torch.stack(right)

    def _compared(self, model: GPTModel, chosen: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Of chosen queries KL(base || draft), float32 [queries], and the draft's first choices."""
        logits = self._logits(model, chosen)
        group = model.eagle_module.eagle_output_layer.tp_group
        return divergence(logits, teacher, group), self._choice(model.eagle_module, logits.detach())

    @torch.no_grad()
    def logits(
        self, model: GPTModel, ids: Tensor, packed: PackedDocuments, aux_hidden_states: Tensor
    ) -> list[Tensor]:
        """Of each step those of the last query, with given tokens to go on: [draft vocabulary] each.

        Args:
            model: unwrapped, in one process.
            ids: int64 [tokens + steps].
            packed: one document of `tokens`.
            aux_hidden_states: [tokens, 1, 3 * hidden].
        """
        count = len(aux_hidden_states)
        last = torch.tensor([count - 1])
        steps = self._steps(
            model, aux_hidden_states, packed, lambda step: ids[1 + step : 1 + step + count][None]
        )
        return [self._logits(model, self._chosen(model, hidden, last))[0] for hidden in steps]

    @torch.no_grad()
    def propose(self, model: GPTModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The base model's next token, and what the draft writes after it, as a server drafts.

        Args:
            model: unwrapped.
            tokens: int64 [1, tokens].

        Returns:
            int64 [1, 1] and int64 [1, steps], tokens of the base's vocabulary.
        """
        module: Any = model.eagle_module
        count, size = tokens.shape[1], model.config.tensor_model_parallel_size
        padding = -count % size  # sequence parallel ranks hold equal parts; a document of its own
        row = torch.nn.functional.pad(tokens, (0, padding))
        packed: PackedDocuments = to_device(
            PackedDocuments.from_lengths(
                [count, padding] if padding else [count], qkv_format="sbhd"
            ),
            tokens.device,
        )
        assert packed.position_ids is not None
        inputs = row, packed.position_ids.unsqueeze(0), None
        states = base_states(model, self.settings.aux_layers, *inputs, packed_seq_params=packed)
        last = torch.tensor([count - 1], device=tokens.device)
        base = self._greedy(model, states.hidden_states.index_select(0, last).squeeze(1))
        drafts: list[Tensor] = []

        def ids(step: int) -> Tensor:
            read = row.roll(-(1 + step), dims=1)
            # Only the last token's query matters from step 1 on.
            read[0, count - 1] = drafts[-1] if drafts else base
            return read

        for hidden in self._steps(model, states.aux_hidden_states, packed, ids):
            written = self._choice(module, self._logits(model, self._chosen(model, hidden, last)))
            drafts.append(written)
        return base.view(1, 1), torch.stack(drafts, dim=1)

    def _steps(
        self,
        model: GPTModel,
        aux_hidden_states: Tensor,
        packed: PackedDocuments,
        ids: Callable[[int], Tensor],
    ) -> Iterator[Tensor]:
        """Of each step what `_layer` makes; `ids`: what the queries of a step read, int64 [1, tokens]."""
        hidden, _ = model.eagle_module.fc(aux_hidden_states)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(self.settings.steps):
            if step and self.settings.detach:
                hidden = hidden.detach()
            hidden = self._layer(model, hidden, ids(step), packed, step, keys, values)
            yield hidden

    def _layer(
        self,
        model: GPTModel,
        hidden: Tensor,
        ids: Tensor,
        packed: PackedDocuments,
        step: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """The draft's layer at one step: [tokens of this rank, 1, hidden], before the final norm."""
        module: Any = model.eagle_module
        layer = module.decoder.layers[0]
        attention = layer.self_attention
        with torch.no_grad():
            embedded = model.embedding(input_ids=ids, position_ids=None)
        read = torch.cat([module.enorm(embedded), layer.input_layernorm(hidden)], dim=-1)
        query, key, value = attention.get_query_key_value_tensors(read)
        angles = self._angles(model, packed, step)
        query, key = rotated(query, angles), rotated(key, angles)
        keys.append(key)
        values.append(value)
        if step == 0:
            mixed = attention.core_attention(query, key, value, None, packed_seq_params=packed)
        else:
            assert packed.query_lengths is not None
            mixed = step_attention(query, keys, values, packed.query_lengths)
        hidden = hidden + attention.linear_proj(mixed)[0]
        return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]

    def _angles(self, model: GPTModel, packed: PackedDocuments, step: int) -> Tensor:
        """float32 [tokens, 1, 1, head_dim]: those of the base model, of positions `step` further on."""
        assert packed.position_ids is not None
        frequencies = model.rotary_pos_emb.original.inv_freq.to(packed.position_ids.device)
        angles = torch.outer((packed.position_ids + step).float(), frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def _chosen(self, model: GPTModel, hidden: Tensor, queries: Tensor) -> Tensor:
        """What the draft's output layer reads of some tokens of the row: [queries, 1, hidden]."""
        module: Any = model.eagle_module
        layer = module.eagle_output_layer
        normed: Tensor = module.decoder.final_layernorm(hidden)
        if layer.sequence_parallel:
            normed = tensor_parallel.gather_from_sequence_parallel_region(
                normed, tensor_parallel_output_grad=False, group=layer.tp_group
            )
        return normed.index_select(0, queries)

    def _logits(self, model: GPTModel, chosen: Tensor) -> Tensor:
        """Draft's logits of what `_chosen` gives: [queries, draft vocabulary of this rank]."""
        layer: Any = model.eagle_module.eagle_output_layer
        parallel = layer.sequence_parallel
        previous = layer.allreduce_dgrad
        layer.sequence_parallel, layer.allreduce_dgrad = False, previous or parallel
        try:
            logits: Tensor = layer(chosen)[0]
        finally:
            layer.sequence_parallel, layer.allreduce_dgrad = parallel, previous
        return self._hide_padding(model, logits.squeeze(1).float())

    def _hide_padding(self, model: GPTModel, logits: Tensor) -> Tensor:
        offsets = getattr(model.eagle_module, "d2t", None)
        real = self.settings.vocabulary if offsets is None else len(offsets)
        rank = model.eagle_module.eagle_output_layer.tp_group.rank()
        return hide_vocabulary_padding(logits, real, rank)

    @torch.no_grad()
    def _teacher_logits(
        self, model: GPTModel, hidden: Tensor, trained: TrainedTokens
    ) -> tuple[Tensor, Tensor]:
        """The base model's logits over the draft's vocabulary, and its own choice of token.

        Returns:
            float32 [trained, draft vocabulary of this rank]; tokens, int64 [trained].
        """
        assert self._teacher is not None
        chosen = hidden.index_select(0, trained.indices).squeeze(1)
        logits = self._hide_padding(model, (chosen @ self._teacher.t()).float())
        if hasattr(model.eagle_module, "d2t"):
            return logits, self._greedy(model, chosen)
        return logits, largest_tokens(logits, model.output_layer.tp_group)

    @torch.no_grad()
    def _greedy(self, model: GPTModel, hidden: Tensor) -> Tensor:
        """The base model's own choice of token: int64 [tokens] of hidden states [tokens, hidden]."""
        group = model.output_layer.tp_group
        parts = base_logits(model, hidden, self.settings.vocabulary)
        return torch.cat([largest_tokens(part, group) for part in parts])

    @torch.no_grad()
    def _choice(self, module: Any, logits: Tensor) -> Tensor:
        """The draft's first choice, a token of the base's vocabulary: int64 [tokens]."""
        choice = largest_tokens(logits, module.eagle_output_layer.tp_group)
        return choice + module.d2t[choice] if hasattr(module, "d2t") else choice


def draft_forward(
    model: Any,
    tokens: Tensor,
    position_ids: Tensor,
    attention_mask: None = None,
    *,
    packed_seq_params: PackedDocuments,
    trained: TrainedTokens,
    aux_hidden_states: Tensor | None = None,
    hidden_states: Tensor | None = None,
) -> Tensor:
    """What `model(...)` of a model with a draft computes: the loss of each trained token, over all steps.

    Args:
        model: the unwrapped model.
        tokens: int64 [1, tokens].
        position_ids: int64 [1, tokens].
        attention_mask: None: documents are all there is.
        packed_seq_params: the documents of the row.
        trained: positions whose next token is trained.
        aux_hidden_states: stored ones of the whole row, [tokens, 1, 3 * hidden]; None: the base
            computes them.
        hidden_states: likewise, [tokens, 1, hidden].

    Returns:
        float32 [trained]. Losses and accuracy of each step are counted apart (`part_names`).
    """
    draft: DraftForward = model.draft
    if aux_hidden_states is None or hidden_states is None:
        states = base_states(
            model,
            draft.settings.aux_layers,
            *(tokens, position_ids, None),
            packed_seq_params=packed_seq_params,
        )
    else:
        dtype = model.eagle_module.fc.weight.dtype
        aux, final = aux_hidden_states.to(dtype), hidden_states.to(dtype)
        if model.config.sequence_parallel:
            aux = tensor_parallel.scatter_to_sequence_parallel_region(aux)
        states = BaseStates(aux, final)
    losses, counted, right = draft.losses(model, tokens, packed_seq_params, trained, states)
    sums = torch.cat([(losses.detach() * counted).sum(1), right.sum(1)])
    counters.add_parts(sums, counted.sum(1).repeat(2))
    decay = draft.settings.decay ** torch.arange(len(losses), device=losses.device).unsqueeze(1)
    total: Tensor = (losses * counted * decay).sum(0)
    return total


def part_names(steps: int) -> list[str]:
    """What `draft_forward` counts apart, by the number of the drafted token."""
    return [f"draft_{what}_{step + 1}" for what in ("loss", "accuracy") for step in range(steps)]


def install_forward(model: GPTModel, settings: DraftSettings) -> None:
    """Let a model that ModelOpt has converted, now or in a checkpoint, run the forward of this file."""
    for layer in model.decoder.layers:  # what collects states for ModelOpt's own forward
        for key, hook in list(layer._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "_transformer_layer_forward_hook":
                del layer._forward_hooks[key]
    model.draft = DraftForward(settings)
    model.forward = types.MethodType(draft_forward, model)
