"""Divergences between a teacher's and a student's distribution over a vocabulary that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def keep_output(module: torch.nn.Module, seen: dict[Any, Tensor], key: Any) -> Any:
    """Let a module leave what it makes in `seen[key]`, each time anew; returns the hook's handle."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_hook(hook)


def _over(value: Tensor, group: ProcessGroup, op: Any = ReduceOp.SUM) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(value, op=op, group=group)
    return value


def _log_sum_exp(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Over the whole vocabulary, of [..., rows of this rank]: [..., 1]; -inf where there is nothing."""
    largest = _over(logits.amax(dim=-1, keepdim=True), group, ReduceOp.MAX)
    largest = largest.clamp(min=torch.finfo(logits.dtype).min)  # -inf - -inf is not a number
    return largest + _over((logits - largest).exp().sum(dim=-1, keepdim=True), group).log()


def log_softmax_over_ranks(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Log-probabilities of this rank's part of the vocabulary; no gradient.

    Args:
        logits: float32 [..., rows of this rank], padding hidden.
        group: the tensor parallel group.
    """
    largest = _over(logits.amax(dim=-1, keepdim=True), group, ReduceOp.MAX)
    shifted = logits - largest
    return shifted - _over(shifted.exp().sum(dim=-1, keepdim=True), group).log()


class _Divergence(torch.autograd.Function):
    """KL(teacher || student); `teacher` makes log-probabilities, of the student's where it needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Callable[[Tensor], Tensor],
        group: ProcessGroup,
        temperature: float,
    ) -> Tensor:
        found = log_softmax_over_ranks(_cooled(student, temperature), group)
        wanted = teacher(found)
        probability = wanted.exp()
        # 0 where the teacher excludes a token (0 * inf else); what is no number stays none.
        terms = torch.where(probability == 0, 0.0, probability * (wanted - found))
        difference = found.exp_().sub_(probability).mul_(temperature)
        ctx.save_for_backward(difference.to(student.dtype))
        return _over(terms.sum(dim=-1), group) * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return (difference * grads[0].unsqueeze(-1)).to(difference.dtype), None, None, None


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    """In fp32, divided by the temperature; never the given tensor changed."""
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def divergence(
    student: Tensor, teacher: Tensor, group: ProcessGroup, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of each token, in fp32, times the temperature's square.

    The gradient is the difference of the two softmaxes, of which each rank has its own part. Neither
    argument is changed (Megatron's cross-entropy works in place on fp32 logits: never give it these).
    With the square a temperature leaves the size of gradients as it is (arXiv 1503.02531, section 2).

    Args:
        student: [tokens, vocabulary rows of this rank], padding hidden.
        teacher: the same shape; no gradient goes there.
        group: the tensor parallel group.
        temperature: both logits are divided by it.

    Returns:
        float32 [tokens], the same on all ranks.
    """
    kept = teacher.detach()
    result: Tensor = _Divergence.apply(
        student,
        lambda found: log_softmax_over_ranks(_cooled(kept, temperature), group),
        *(group, temperature),
    )
    return result


class TopTokens(NamedTuple):
    """The most probable tokens of a teacher, and how probable all others are together."""

    ids: Tensor
    """int64 [tokens, k]."""
    log_probs: Tensor
    """float32 [tokens, k]."""
    rest: Tensor
    """Logarithm of the others' probability, -inf for none: float32 [tokens, 1]."""


@torch.no_grad()
def top_tokens(logits: Tensor, k: int, group: ProcessGroup, temperature: float = 1.0) -> TopTokens:
    """The k most probable tokens of the whole vocabulary, the same on all ranks.

    Args:
        logits: [tokens, vocabulary rows of this rank], padding hidden; not changed.
        k: no more than the vocabulary has.
        group: the tensor parallel group.
        temperature: logits are divided by it.
    """
    if not len(logits):  # collectives of nothing are not defined everywhere
        nothing = logits.new_empty(0, k, dtype=torch.float32)
        return TopTokens(nothing.long(), nothing, nothing[:, :1])
    found = log_softmax_over_ranks(_cooled(logits, temperature), group)
    rows = found.shape[-1]
    values, ids = found.topk(min(k, rows), dim=-1)
    ids += group.rank() * rows
    if group.size() > 1:
        both = torch.stack([values.double(), ids.double()])  # float64 holds every token exactly
        every = [torch.empty_like(both) for _ in range(group.size())]
        torch.distributed.all_gather(every, both, group=group)
        candidates, names = torch.cat(every, dim=-1).unbind(0)
        values, best = candidates.float().topk(k, dim=-1)
        ids = names.gather(-1, best).long()
    return TopTokens(ids, values, _log_sum_exp(_without(found, ids, group), group))


def _without(values: Tensor, ids: Tensor, group: ProcessGroup, other: Any = None) -> Tensor:
    """A copy of [tokens, rows of this rank] with `other`, [tokens, k] or -inf, at ids of all ranks."""
    rows = values.shape[-1]
    local = ids - group.rank() * rows
    # Others' ids go to a row behind the last.
    local = torch.where((local >= 0) & (local < rows), local, rows)
    wider = torch.nn.functional.pad(values, (0, 1))
    return wider.scatter(-1, local, float("-inf") if other is None else other)[..., :rows]


def sparse_divergence(
    student: Tensor, teacher: TopTokens, group: ProcessGroup, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of each token where all but the teacher's top tokens are one, the ghost.

    The student's ghost has the mass that its own softmax over the whole vocabulary gives the others. With
    all tokens named it is `divergence`. The temperature must be the teacher's own, that of `top_tokens`.

    Args:
        student: [tokens, vocabulary rows of this rank], padding hidden; not changed.
        teacher: its top tokens.
        group: the tensor parallel group.
        temperature: as in `divergence`.

    Returns:
        float32 [tokens], the same on all ranks.
    """
    ids, log_probs, rest = teacher.ids.long(), teacher.log_probs.float(), teacher.rest.float()

    def spread(found: Tensor) -> Tensor:
        """The teacher's named tokens, and the rest over the others as the student itself spreads it."""
        others = _without(found, ids, group)
        found_rest = _log_sum_exp(others, group)
        # With all tokens named there is no rest, however its rounding was stored.
        left = rest.masked_fill(found_rest <= torch.finfo(found.dtype).min / 2, float("-inf"))
        # Stored in half precision they do not add up to 1.
        wanted = torch.cat([log_probs, left], dim=-1).log_softmax(dim=-1)
        named, left = wanted[..., :-1], wanted[..., -1:]
        shift = torch.where(left == float("-inf"), left, left - found_rest)
        return _without(others + shift, ids, group, named)

    result: Tensor = _Divergence.apply(student, spread, group, temperature)
    return result
