"""Divergences between a teacher's and a student's distribution over a vocabulary that ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def _over(value: Tensor, group: ProcessGroup, op: Any = ReduceOp.SUM) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(value, op=op, group=group)
    return value


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
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, group: ProcessGroup) -> Tensor:
        wanted = log_softmax_over_ranks(teacher.float(), group)
        found = log_softmax_over_ranks(student.float(), group)
        probability = wanted.exp()
        # 0 where the teacher excludes a token (0 * inf else).
        terms = torch.where(probability > 0, probability * (wanted - found), 0.0)
        ctx.save_for_backward(found.exp_().sub_(probability).to(student.dtype))
        return _over(terms.sum(dim=-1), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * grads[0].unsqueeze(-1)).to(difference.dtype), None, None


def divergence(student: Tensor, teacher: Tensor, group: ProcessGroup) -> Tensor:
    """KL(teacher || student) of each token, in fp32.

    The gradient is the difference of the two softmaxes, of which each rank has its own part. Neither
    argument is changed (Megatron's cross-entropy works in place on fp32 logits: never give it these).

    Args:
        student: [tokens, vocabulary rows of this rank], padding hidden.
        teacher: the same shape; no gradient goes there.
        group: the tensor parallel group.

    Returns:
        float32 [tokens], the same on all ranks.
    """
    result: Tensor = _Divergence.apply(student, teacher.detach(), group)
    return result
