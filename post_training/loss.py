"""The loss: cross-entropy at trained tokens only, summed and weighted by token over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from post_training.nonfinite import guard
from post_training.step_counters import counters


@dataclass(frozen=True)
class TrainedTokens:
    """Which rows of a micro batch have a label, and with which weight."""

    indices: Tensor
    """Positions in the flattened micro batch: int64 [trained]. Never empty, see `from_mask`."""
    weights: Tensor
    """1 for a trained token, 0 for the stand-in of an empty micro batch: float32 [trained]."""
    groups: Tensor
    """Which group each belongs to, from 0: int64 [trained]. A group is a source of a mixture, or what the
    isolation check tells apart."""

    @classmethod
    def from_mask(cls, mask: Tensor) -> TrainedTokens:
        """Find the trained tokens of `mask`: uint8 [tokens], 0 or 1 + the number of the token's group.

        A micro batch without any (a filler pack) keeps its first token at weight 0, because
        collectives of an empty tensor are not defined on every backend.
        """
        indices = torch.nonzero(mask).flatten()
        if indices.numel() == 0:
            nothing = mask.new_zeros(1, dtype=torch.int64)
            return cls(nothing, nothing.float(), nothing)
        groups = mask.index_select(0, indices).long() - 1
        return cls(indices, torch.ones_like(indices, dtype=torch.float32), groups)


def hide_vocabulary_padding(logits: Tensor, vocabulary: int, tp_rank: int) -> Tensor:
    """Take the padded rows of the vocabulary out of the softmax.

    Args:
        logits: [..., vocabulary rows of this tensor parallel rank]; changed in place.
        vocabulary: tokens there really are.
        tp_rank: rank in the tensor parallel group.

    Returns:
        `logits`.
    """
    real = max(0, vocabulary - tp_rank * logits.shape[-1])
    if real < logits.shape[-1]:
        logits[..., real:] = torch.finfo(logits.dtype).min
    return logits


def trained_token_loss(vocabulary: int) -> Callable[..., Tensor]:
    """An `output_processor` for `GPTModel.forward` that computes logits of trained tokens only.

    An answer-only mask leaves a part of a pack's tokens without a label; their logits, by far the
    largest tensor of a step, are never made.

    Args:
        vocabulary: tokens there really are; padded rows are hidden from the softmax.

    Returns:
        A function from hidden states [tokens, 1, hidden] to losses, float32 [trained tokens].
    """

    def process(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        context: TrainedTokens,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **unused: Any,
    ) -> Tensor:
        sequence_parallel = output_layer.sequence_parallel
        if sequence_parallel:
            # Rows are spread over the tensor parallel group: trained ones are chosen from all. The
            # output layer then reduces the gradient itself, so the gather need not.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
            )
        chosen = hidden_states.index_select(0, context.indices)
        previous = output_layer.allreduce_dgrad
        output_layer.sequence_parallel = False
        if sequence_parallel:
            output_layer.allreduce_dgrad = True
        try:
            logits, _ = output_layer(chosen, weight=output_weight)
        finally:
            output_layer.sequence_parallel = sequence_parallel
            output_layer.allreduce_dgrad = previous
        hide_vocabulary_padding(logits, vocabulary, output_layer.tp_group.rank())
        chosen_labels = labels.flatten().index_select(0, context.indices).unsqueeze(0)
        return compute_language_model_loss(chosen_labels, logits).flatten()

    return process


def loss_func(trained: TrainedTokens, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of one micro batch.

    With `--calculate-per-token-loss` Megatron divides summed gradients by the token count of the whole
    global batch, so that every trained token weighs the same wherever it lies.

    Args:
        trained: which tokens have a label, and their weights.
        losses: the model's output: float32 [trained tokens] from `trained_token_loss`, or of every
            token, [1, tokens], from a model that takes no output processor (ModelOpt's draft heads).

    Returns:
        The sum (a scalar with gradient), the number of trained tokens (int, for Megatron to add up),
        and the report `{"lm loss": [sum, count]}`.
    """
    flat = losses.flatten()
    if flat.numel() != trained.indices.numel():
        flat = flat.index_select(0, trained.indices)
    weighted = flat.float() * trained.weights
    total = torch.sum(weighted)
    count = trained.weights.sum()
    report = torch.stack([total.detach(), count])
    counters.add_losses(weighted.detach(), trained.weights, trained.groups)
    return guard.watch(trained.indices, weighted, total), count.to(torch.int), {"lm loss": report}
