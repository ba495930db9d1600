import math

import pytest
import torch
import torch.nn.functional as F

from post_training.batch.trained_tokens import TrainedTokens
from post_training.training.loss import StepLosses, hide_vocabulary_padding, loss_func
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks, run_script
from tests.helpers.models import VOCABULARY
from tests.helpers.packs import make_pack, stacked


def kept():
    losses = StepLosses()
    losses.start()
    return losses


def trained_of(*mask):
    return TrainedTokens.from_mask(torch.tensor(mask), torch.zeros(len(mask), dtype=torch.int64))


def test_trained_tokens_are_where_the_mask_is_one():
    trained = trained_of(0, 1, 1, 0, 1)
    assert trained.indices.tolist() == [1, 2, 4]
    assert trained.weights.tolist() == [1.0, 1.0, 1.0]
    assert trained.weights.dtype == torch.float32


def test_groups_are_told_apart_and_weigh_alike():
    groups = torch.tensor([7, 2, 0, 1, 300])
    trained = TrainedTokens.from_mask(torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8), groups)
    assert trained.groups.tolist() == [2, 0, 300]
    assert trained.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_filler_pack_weighs_nothing():
    trained = trained_of(0, 0, 0, 0, 0)
    losses = torch.tensor([3.0], requires_grad=True)
    total, count, report = loss_func(trained, losses)
    total.backward()
    assert trained.indices.tolist() == [0]
    assert (total.item(), count.item(), report["lm loss"].tolist()) == (0.0, 0, [0.0, 0.0])
    assert losses.grad is not None and losses.grad.tolist() == [0.0]


def test_loss_is_summed_and_counted_not_averaged():
    """Reference's fault: the mean of each micro batch, whatever its number of tokens."""
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    total, count, report = loss_func(trained_of(1, 1, 1), losses)
    total.backward()
    assert (total.item(), count.item()) == (7.0, 3)
    assert not count.is_floating_point()
    assert losses.grad is not None and losses.grad.tolist() == [1.0, 1.0, 1.0]
    assert report["lm loss"].tolist() == [7.0, 3.0]
    assert not report["lm loss"].requires_grad


@pytest.mark.parametrize("scale", [1.0, 3.7e-20, 1.1e30])
def test_finite_losses_are_not_changed_by_a_bit_when_they_are_kept(scale):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * scale
    results = []
    for losses in (StepLosses(), kept()):
        x = logits.clone().requires_grad_()
        total = losses.keep(torch.arange(50), x, x.sum())
        (total * 3.3).backward()
        results.append((total.item(), x.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_an_infinite_loss_gets_a_gradient_that_is_noticed():
    x = torch.ones(3, requires_grad=True)
    total = kept().keep(torch.arange(3), x, (x + torch.tensor([0.0, math.inf, 0.0])).sum())
    total.backward()
    assert x.grad is not None and torch.isnan(x.grad).all()


def test_losses_of_training_are_kept_until_they_are_taken():
    losses = kept()
    losses.keep(torch.arange(2), torch.zeros(2), torch.tensor(math.nan))  # an evaluation's
    assert losses.take() == []
    x = torch.ones(3, requires_grad=True)
    losses.keep(torch.arange(3), x, x.sum())
    ((indices, values),) = losses.take()
    assert indices.tolist() == [0, 1, 2] and not values.requires_grad
    assert losses.take() == []


def test_the_loss_loads_little_of_the_project():
    """Not the saver, the watchdog or the data, of which it knows nothing."""
    program = "import sys, post_training.training.loss; print(*sorted(sys.modules))"
    done = run_script("-c", program).stdout.split()
    own = [name for name in done if name.split(".")[0] in ("post_training", "data")]
    assert len(own) < 8, own


def test_losses_of_all_tokens_are_cut_to_the_trained_ones():
    trained = trained_of(0, 1, 0, 1)
    total, count, _ = loss_func(trained, torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert (total.item(), count.item()) == (10.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "tp"), [(13, 1), (13, 2), (13, 4), (7, 2), (16, 2)])
def test_padded_rows_have_no_part_in_the_softmax(vocabulary, tp, dtype):
    whole = torch.randn(3, 16).to(dtype)
    shards = [
        hide_vocabulary_padding(s.clone(), vocabulary, r) for r, s in enumerate(whole.chunk(tp, 1))
    ]
    hidden = torch.cat(shards, 1)
    assert torch.equal(hidden[:, :vocabulary], whole[:, :vocabulary])
    found = hidden.float().softmax(-1)
    assert not found[:, vocabulary:].any()
    torch.testing.assert_close(found[:, :vocabulary], whole[:, :vocabulary].float().softmax(-1))


def _right(logits, labels, vocabulary):
    """What this rank's part of the vocabulary gives, hidden padding and all."""
    from post_training.training.loss import hide_vocabulary_padding, largest_tokens

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    assert group is not None
    part = logits.chunk(group.size(), 1)[group.rank()].clone()
    before = hide_vocabulary_padding(part, vocabulary, group.rank()).clone()
    found = (largest_tokens(part, group) == labels).float()
    assert torch.equal(part, before)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_largest_tokens_are_found_over_the_parts_of_the_vocabulary(world):
    """Of equals the first of the vocabulary counts; padded rows, larger than all, never do."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (300, 16), generator=generator).float()
    logits[:, 13:] = 9.0
    labels = torch.randint(0, 13, (300,), generator=generator)
    labels[::2] = logits[::2, :13].argmax(-1)
    expected = (logits[:, :13].argmax(-1) == labels).float()
    ties = (logits[:, :13] == logits[:, :13].amax(1, keepdim=True)).sum(1) > 1
    assert ties.sum() > 200 and 150 <= expected.sum() < 200
    for found in run_ranks(_right, world, logits, labels, 13):
        assert torch.equal(found, expected)


def _both_losses(argv, fields):
    """The loss at trained tokens, and the full cross-entropy times the mask, with gradients."""
    from post_training.batch.assemble import assemble_batch
    from post_training.training.loss import loss_func, trained_token_loss

    _, built = megatron_model.set_up(argv)
    model = megatron_model.unwrapped(built)
    with torch.no_grad():
        model.output_layer.weight[VOCABULARY:] = 1.0  # would count if it were looked at
    batch = assemble_batch(fields, qkv_format="sbhd")
    parameters = list(model.parameters())

    losses = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=batch.packed,
        output_processor=trained_token_loss(VOCABULARY),
        output_processor_context=batch.trained,
    )
    total, count, _ = loss_func(batch.trained, losses)
    gradients = torch.autograd.grad(total, parameters)

    logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
    every = F.cross_entropy(logits[0, :, :VOCABULARY], batch.labels[0], reduction="none")
    expected = (every * batch.label_mask).sum()
    expected_gradients = torch.autograd.grad(expected, parameters)
    worst = max(
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(gradients, expected_gradients, strict=True)
    )
    padding = gradients[-1][VOCABULARY:].abs().max().item()
    return total.item(), expected.item(), int(count), int(batch.label_mask.sum()), worst, padding


def test_loss_at_trained_tokens_is_the_masked_full_loss(hf_model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (64,), generator=generator)
    mask = (torch.rand(64, generator=generator) < 0.4).long()
    argv = megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))
    found = run_rank(_both_losses, argv, stacked([make_pack(ids, mask, [40, 24])]))
    total, expected, count, trained, worst, padding = found
    assert count == trained > 0
    assert total == pytest.approx(expected, rel=1e-6)
    assert worst < 1e-5
    assert padding == 0.0
