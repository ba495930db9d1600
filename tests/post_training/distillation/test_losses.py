"""Divergences against torch's own, dense and sparse, on one rank and on two."""

import pytest
import torch
from torch.nn import functional

from tests.helpers.launch import run_ranks

VOCABULARY, PADDED, TOKENS = 13, 16, 7


def logits(seed):
    values = torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(seed)) * 3
    values[:, VOCABULARY:] = torch.finfo(values.dtype).min
    return values


def both_divergences(k, temperature, stored):
    """Losses and gradients on this rank's rows: dense, and of the k top tokens."""
    import torch.distributed as dist

    from post_training.distillation.losses import divergence, sparse_divergence, top_tokens

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rows = PADDED // group.size()
    mine = slice(group.rank() * rows, (group.rank() + 1) * rows)
    teacher = logits(1)[:, mine].clone()
    found = []
    for kind in ("dense", "sparse"):
        student = logits(2)[:, mine].clone().requires_grad_()
        before = student.detach().clone(), teacher.clone()
        if kind == "dense":
            losses = divergence(student, teacher, group, temperature)
        else:
            top = top_tokens(teacher, k, group, temperature)
            if stored is not None:
                top = type(top)(top.ids.int(), top.log_probs.to(stored), top.rest.to(stored))
            losses = sparse_divergence(student, top, group, temperature)
        (losses * torch.arange(1.0, TOKENS + 1)).sum().backward()
        assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
        found.append((losses.detach(), student.grad))
    return found


def expected(k, temperature):
    """The same with torch's functions over one whole vocabulary."""
    student = logits(2)[:, :VOCABULARY].clone().requires_grad_()
    q = functional.log_softmax(student / temperature, dim=-1).exp()
    p = functional.softmax(logits(1)[:, :VOCABULARY] / temperature, dim=-1)
    if k is not None:
        ids = p.topk(k).indices
        p, q = (
            torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], dim=-1)
            for x in (p, q)
        )
    losses = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    (losses * torch.arange(1.0, TOKENS + 1)).sum().backward()
    return losses.detach(), functional.pad(student.grad, (0, PADDED - VOCABULARY))


@pytest.mark.parametrize("world", [1, 2])
def test_divergences_are_those_of_torch(world):
    for k, temperature in ((4, 1.0), (9, 2.5)):
        ranks = run_ranks(both_divergences, world, k, temperature, None)
        for kind, size in ((0, None), (1, k)):
            losses, gradient = expected(size, temperature)
            for rank in ranks:
                assert torch.allclose(rank[kind][0], losses, rtol=1e-5, atol=1e-6)
            whole = torch.cat([rank[kind][1] for rank in ranks], dim=-1)
            assert torch.allclose(whole, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [None, torch.float32])
def test_all_tokens_are_the_whole_distribution(stored):
    """With k = vocabulary there is no ghost; in particular no infinite one."""
    for dense, sparse in zip(
        *[iter(run_ranks(both_divergences, 2, VOCABULARY, 1.0, stored)[0])] * 2, strict=True
    ):
        assert torch.allclose(sparse[0], dense[0], rtol=1e-5)
        assert torch.allclose(sparse[1], dense[1], atol=1e-6)


def test_rounded_probabilities_are_a_distribution_again():
    """In half precision they do not add up to 1, which would push all of the student's logits."""
    _, (losses, gradient) = run_ranks(both_divergences, 1, 5, 1.0, torch.bfloat16)[0]
    assert torch.allclose(losses, expected(5, 1.0)[0], rtol=0.02, atol=0.02)
    assert torch.allclose(gradient.sum(-1), torch.zeros(TOKENS), atol=1e-5)
