"""Divergences over a vocabulary that ranks share, dense and of top tokens, against torch's own."""

import pytest
import torch
from torch.nn import functional

from tests.helpers.launch import run_ranks

TOKENS, VOCABULARY = 12, 26


def _logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 3 for _ in range(2))
    teacher[:, 5] = torch.finfo(torch.float32).min  # a token that the teacher excludes
    return student, teacher


def _divergence(student, teacher):
    from post_training.distillation.losses import divergence

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    parts = [x.chunk(group.size(), 1)[group.rank()].clone() for x in (student, teacher)]
    before = [part.clone() for part in parts]
    parts[0].requires_grad_()
    losses = divergence(parts[0], parts[1], group)
    (losses * torch.arange(1.0, TOKENS + 1)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True)), "changed in place"
    return losses.detach(), parts[0].grad


@pytest.mark.parametrize("world", [1, 2])
def test_it_is_kl_of_the_whole_vocabulary(world):
    student, teacher = _logits()
    student.requires_grad_()
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (expected * torch.arange(1.0, TOKENS + 1)).sum().backward()
    found = run_ranks(_divergence, world, *(x.detach() for x in (student, teacher)))
    for losses, _ in found:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([part for _, part in found], dim=1)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-5, atol=1e-6)


def _of_nan():
    from post_training.distillation.losses import TopTokens, divergence, sparse_divergence

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    student, teacher = _logits()
    teacher[3, 4] = float("nan")
    top = TopTokens(*(torch.full((TOKENS, n), v) for n, v in ((2, 0), (2, -1.0), (1, -1.0))))
    top.ids[:, 1] = 1
    top.rest[3] = float("nan")
    return divergence(student, teacher, group), sparse_divergence(student, top, group)


def test_a_teacher_that_is_no_number_gives_no_loss_of_zero():
    """The guard names the document of a loss that is not finite; 0 would be learned."""
    for losses in run_ranks(_of_nan, 1)[0]:
        assert losses.isnan().tolist() == [row == 3 for row in range(TOKENS)]


def _top(logits, k):
    from post_training.distillation.losses import top_tokens

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    return top_tokens(logits.chunk(group.size(), 1)[group.rank()].clone(), k, group)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_top_tokens_and_the_rest(world, k):
    _, teacher = _logits()
    values, ids = teacher.log_softmax(-1).topk(k)
    for found_ids, found_values, rest in run_ranks(_top, world, teacher, k):
        assert torch.equal(found_ids[:, :3], ids[:, :3])
        torch.testing.assert_close(found_values, values, rtol=1e-5, atol=1e-6)
        whole = found_values.exp().sum(-1) + rest.exp()[:, 0]
        torch.testing.assert_close(whole, torch.ones(TOKENS))


REAL, PADDED = 13, 16


def _padded(seed):
    values = torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(seed)) * 3
    values[:, REAL:] = torch.finfo(values.dtype).min
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
    teacher = _padded(1)[:, mine].clone()
    found = []
    for kind in ("dense", "sparse"):
        student = _padded(2)[:, mine].clone().requires_grad_()
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
    student = _padded(2)[:, :REAL].clone().requires_grad_()
    q = functional.log_softmax(student / temperature, dim=-1).exp()
    p = functional.softmax(_padded(1)[:, :REAL] / temperature, dim=-1)
    if k is not None:
        ids = p.topk(k).indices
        p, q = (
            torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], dim=-1)
            for x in (p, q)
        )
    losses = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    (losses * torch.arange(1.0, TOKENS + 1)).sum().backward()
    return losses.detach(), functional.pad(student.grad, (0, PADDED - REAL))


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
        *[iter(run_ranks(both_divergences, 2, REAL, 1.0, stored)[0])] * 2, strict=True
    ):
        assert torch.allclose(sparse[0], dense[0], rtol=1e-5)
        assert torch.allclose(sparse[1], dense[1], atol=1e-6)


def test_rounded_probabilities_are_a_distribution_again():
    """In half precision they do not add up to 1, which would push all of the student's logits."""
    _, (losses, gradient) = run_ranks(both_divergences, 1, 5, 1.0, torch.bfloat16)[0]
    assert torch.allclose(losses, expected(5, 1.0)[0], rtol=0.02, atol=0.02)
    assert torch.allclose(gradient.sum(-1), torch.zeros(TOKENS), atol=1e-5)
