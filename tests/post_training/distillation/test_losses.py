"""Divergences over a vocabulary that ranks share, against torch's own."""

import pytest
import torch

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


def _top(logits, k):
    from post_training.distillation.extraction import top_tokens

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
        assert torch.equal(found_ids.long()[:, :3], ids[:, :3]) and found_ids.dtype == torch.int32
        torch.testing.assert_close(found_values, values, rtol=1e-5, atol=1e-6)
        whole = found_values.exp().sum(-1) + rest.exp()[:, 0]
        torch.testing.assert_close(whole, torch.ones(TOKENS))
