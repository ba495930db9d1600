"""The loss: cross-entropy at trained tokens only, summed and weighted by token over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from post_training.batch.trained_tokens import TrainedTokens
from post_training.metrics.step_counters import counters


class StepLosses:
    """The losses of one step's micro batches on the last pipeline stage; the one instance is `step_losses`.

    Nothing is kept until somebody wants to read it.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def start(self) -> None:
        """Keep losses from now on, until `take` is called."""
        self._kept = []

    def keep(self, indices: Tensor, losses: Tensor, total: Tensor) -> Tensor:
        """Remember one micro batch of training.

        Args:
            indices: positions of trained tokens in this rank's part of the row: int64 [trained].
            losses: float32 [trained].
            total: their sum, a scalar with gradient.

        Returns:
            `total`, bit for bit, with the same gradient where it is finite and NaN where not: so the
            norm of the whole gradient tells of a bad loss on any rank.
        """
        if self._kept is None or not total.requires_grad:
            return total
        self._kept.append((indices, losses.detach()))
        # 1 for a finite total; infinity times 0 is not a number.
        return total * (1 + 0 * total.detach())

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """(indices, losses) of each micro batch since the last call, which are then forgotten."""
        kept = self._kept or []
        self.start()
        return kept


step_losses = StepLosses()


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


@torch.no_grad()
def largest_tokens(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """The most probable tokens, of equally probable ones the first of the vocabulary.

    Args:
        logits: [..., vocabulary rows of this tensor parallel rank], padded rows hidden; not changed.
        group: the tensor parallel group; None where there is none.

    Returns:
        int64 [...], the same on all ranks of the group.
    """
    rows = logits.shape[-1]
    largest, tokens = logits.max(dim=-1)  # the first of equals
    if group is not None and group.size() > 1:
        tokens += group.rank() * rows
        # Both in one message: float64 holds every logit and every token exactly.
        own = torch.stack([largest.double(), tokens.double()])
        every = own.new_empty(group.size() * len(own), *own.shape[1:])
        torch.distributed.all_gather_into_tensor(every, own, group=group)
        every = every.view(group.size(), *own.shape)
        # Of equals the lowest rank, which holds the earlier tokens.
        winner = every[:, 0].max(dim=0, keepdim=True).indices
        tokens = every[:, 1].gather(0, winner).squeeze(0).long()
    return tokens


def trained_logits(
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    trained: TrainedTokens,
    vocabulary: int,
) -> Tensor:
    """Logits of trained tokens only, from what an `output_processor` is given.

    Args:
        hidden_states: after the final norm, of this rank's tokens under sequence parallelism:
            [tokens, 1, hidden].
        output_layer: the model's.
        output_weight: its weight where that is the embedding's.
        trained: which tokens.
        vocabulary: tokens there really are; padded rows are hidden from the softmax.

    Returns:
        [trained, 1, vocabulary rows of this tensor parallel rank].
    """
    sequence_parallel = output_layer.sequence_parallel
    if sequence_parallel:
        # Rows are spread over the tensor parallel group: trained ones are chosen from all. The
        # output layer then reduces the gradient itself, so the gather need not.
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    chosen = hidden_states.index_select(0, trained.indices)
    previous = output_layer.allreduce_dgrad
    output_layer.sequence_parallel = False
    if sequence_parallel:
        output_layer.allreduce_dgrad = True
    try:
        logits, _ = output_layer(chosen, weight=output_weight)
    finally:
        output_layer.sequence_parallel = sequence_parallel
        output_layer.allreduce_dgrad = previous
    return hide_vocabulary_padding(logits, vocabulary, output_layer.tp_group.rank())


def trained_token_loss(
    vocabulary: int, teach: Callable[[Tensor, Any], Tensor] | None = None
) -> Callable[..., Tensor]:
    """An `output_processor` for `GPTModel.forward` that computes logits of trained tokens only.

    An answer-only mask leaves a part of a pack's tokens without a label; their logits, by far the
    largest tensor of a step, are never made. While they are there, the right ones are counted.

    Args:
        vocabulary: tokens there really are; padded rows are hidden from the softmax.
        teach: makes the losses of the logits, [trained, 1, vocabulary rows of this rank], and of the
            function that gives their cross-entropies and overwrites them; None: those are the losses.

    Returns:
        A function from hidden states [tokens, 1, hidden] to losses, float32 [trained tokens].
    """

    def process(
        *,
        labels: Tensor,
        context: TrainedTokens,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        hidden_states: Tensor | None = None,
        output_layer: Any = None,
        output_weight: Tensor | None = None,
        logits: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        if logits is None:  # which a model that is not Megatron's makes itself
            assert hidden_states is not None
            logits = trained_logits(hidden_states, output_layer, output_weight, context, vocabulary)
        chosen_labels = labels.flatten().index_select(0, context.indices).unsqueeze(0)
        # Before the loss, which overwrites fp32 logits.
        group = getattr(output_layer, "tp_group", None)
        right = largest_tokens(logits.squeeze(1), group) == chosen_labels[0]
        counters.add_right(right * context.weights)
        if teach is None:
            return compute_language_model_loss(chosen_labels, logits).flatten()
        return teach(
            logits, lambda given: compute_language_model_loss(chosen_labels, given).flatten()
        )

    return process


def loss_func(
    trained: TrainedTokens, losses: Tensor, *, reported: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of one micro batch.

    With `--calculate-per-token-loss` Megatron divides summed gradients by the token count of the whole
    global batch, so that every trained token weighs the same wherever it lies.

    Args:
        trained: which tokens have a label, and their weights.
        losses: the model's output: float32 [trained tokens] from `trained_token_loss`, or of every
            token, [1, tokens], from a model that takes no output processor (ModelOpt's draft heads).
        reported: what is told as the loss where that is not what is trained: float32 [trained tokens].

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
    told = weighted.detach() if reported is None else reported * trained.weights
    report = torch.stack([told.sum(), count])
    counters.add_losses(told, trained.weights, trained.groups)
    total = step_losses.keep(trained.indices, weighted, total)
    return total, count.to(torch.int), {"lm loss": report}
