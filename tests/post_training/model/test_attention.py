import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from post_training.batch.context_parallel import ContextParallelCut
from post_training.batch.packed_documents import PackedDocuments
from post_training.model.attention import PackedAttention
from tests.helpers.launch import run_ranks

HEADS, DIM = 4, 8
LENGTHS = [5, 1, 15, 3]


def make(groups, pg_collection=None, **options):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        **({"attention_dropout": 0.0} | options),
    )
    alone = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    attention = PackedAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=pg_collection or alone
    )
    if attention.softmax_offset is not None:
        attention.softmax_offset.data = torch.linspace(-1, 2, HEADS, dtype=torch.float64)
    return attention


def inputs(groups):
    torch.manual_seed(0)
    return [
        torch.randn(sum(LENGTHS), 1, heads, DIM, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, groups, groups)
    ]


def documents(lengths=LENGTHS):
    return PackedDocuments.from_lengths(lengths, qkv_format="sbhd")


def dense_reference(query, key, value, window=None, sinks=None):
    """Softmax attention with the whole score matrix and a causal mask, over one document."""
    repeat = HEADS // key.shape[2]
    q = query[:, 0].transpose(0, 1)
    k, v = (x[:, 0].repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (key, value))
    scores = q @ k.transpose(1, 2) / DIM**0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=2)
    weights = scores.softmax(-1)[:, :, : len(query)]
    return (weights @ v).transpose(0, 1).reshape(len(query), 1, -1)


WINDOW: dict[str, Any] = {"window_size": (3, 0)}
SINKS: dict[str, Any] = {"softmax_type": "learnable"}
# By what the configuration says; a window shorter than some documents and longer than others.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": WINDOW,
    "sinks": SINKS,
    "window and sinks": WINDOW | SINKS,
}


def reference_of(attention):
    sinks = attention.softmax_offset
    return functools.partial(dense_reference, window=attention.window, sinks=sinks)


@pytest.mark.parametrize(
    ("groups", "kind"), [(4, "plain"), (2, "plain"), (1, "plain"), *((2, k) for k in KINDS)]
)
def test_each_document_attends_as_if_alone(groups, kind):
    """Reference's fault: documents in a pack attend to each other."""
    attention, tensors = make(groups, **KINDS[kind]), inputs(groups)
    found = attention(*tensors, None, packed_seq_params=documents())
    parts = zip(*(x.split(LENGTHS) for x in tensors), strict=True)
    expected = torch.cat([reference_of(attention)(*part) for part in parts])
    tensors += attention.parameters()
    assert found.shape == (sum(LENGTHS), 1, HEADS * DIM)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, tensors, seed),
        torch.autograd.grad(expected, tensors, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_changed_document_leaves_the_others_bit_identical():
    tensors = inputs(2)
    packed, attention = documents(), make(2)
    before = attention(*tensors, None, packed_seq_params=packed)
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[6:21] += 1.0
    after = attention(*changed, None, packed_seq_params=packed)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[21:], after[21:])
    assert not torch.equal(before[6:21], after[6:21])


def test_without_documents_it_is_plain_causal_attention():
    tensors = inputs(2)
    found = make(2)(*tensors, None, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(found, dense_reference(*tensors), rtol=1e-12, atol=1e-12)


class OnGpu(torch.Tensor):
    """A tensor of the host that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize(
    ("tensor_type", "dtype", "queries", "heads_of_keys"),
    [
        (OnGpu, torch.float32, 7, HEADS),
        (OnGpu, torch.bfloat16, 7, 2),
        (OnGpu, torch.bfloat16, 3, HEADS),  # with a mask
        (torch.Tensor, torch.float32, 7, 2),
    ],
)
def test_on_cuda_heads_are_repeated_where_no_kernel_takes_groups(
    monkeypatch, tensor_type, dtype, queries, heads_of_keys
):
    attend, seen = F.scaled_dot_product_attention, []

    def kernel(query, key, value, **options):
        seen.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    torch.manual_seed(0)
    rows = [torch.randn(1, h, t, DIM) for h, t in ((HEADS, queries), (2, 7), (2, 7))]
    expected = make(2)._dense(*rows, True, 0.0)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    found = make(2)._dense(*(x.to(dtype).as_subclass(tensor_type) for x in rows), True, 0.0)
    assert seen == [(heads_of_keys, heads_of_keys, heads_of_keys < HEADS)]
    near = 1e-6 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        found.as_subclass(torch.Tensor).float(), expected, rtol=near, atol=near
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_after_the_prompt_sees_every_key_of_its_window(kind):
    query, key, value = inputs(2)
    attention = make(2, **KINDS[kind])
    whole = reference_of(attention)(query, key, value)
    step = attention(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(step, whole[-1:], rtol=1e-12, atol=1e-12)


def _dropout_on_ranks() -> tuple[list[torch.Tensor], bool]:
    """Two passes of training and two of evaluation, and whether the common random state moved."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    attention, packed = make(4, attention_dropout=0.5), documents()
    tensors = [x.detach() for x in inputs(4)]
    before = torch.get_rng_state()
    passes = []
    for training in (True, True, False, False):
        attention.train(training)
        passes.append(attention(*tensors, None, packed_seq_params=packed))
    return passes, torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_dropout_only_while_training_and_apart_on_each_tensor_parallel_rank():
    (first, still), (second, also_still) = run_ranks(_dropout_on_ranks, 2)
    assert torch.equal(first[2], first[3]) and torch.equal(first[2], second[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0]), "ranks hold different heads"
    assert still and also_still


def test_layers_without_a_window_see_whole_documents():
    config: dict[str, Any] = {"window_size": (3, 0), "window_attn_skip_freq": [0]}
    tensors = inputs(2)
    found, expected = (
        make(2, **options)(*tensors, None, packed_seq_params=documents())
        for options in (config, {})
    )
    assert torch.equal(found, expected)


def _attend_on_ranks(groups: int, kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """This context parallel rank's part of the output, and of the gradients of query, key and value."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    cut = cut_for(size, torch.distributed.get_rank())
    local = [x.detach()[cut.local_indices].requires_grad_() for x in inputs(groups)]
    groups_of_ranks = ProcessGroupCollection.use_mpu_process_groups()
    attention = make(groups, pg_collection=groups_of_ranks, **KINDS[kind])
    out = attention(*local, None, packed_seq_params=PackedDocuments.from_cut(cut, LENGTHS))
    grads = torch.autograd.grad(out, local, seed(out.shape[2])[cut.local_indices])
    return out.detach(), list(grads)


def cut_for(size, rank):
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    return ContextParallelCut.make(bounds, size=size, rank=rank, tile=1)


def seed(width):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(LENGTHS), 1, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("size", "kind"), [(2, "plain"), (4, "plain"), (2, "window and sinks")])
def test_context_parallel_ranks_together_do_what_one_does(size, kind):
    tensors = inputs(2)
    whole = make(2, **KINDS[kind])(*tensors, None, packed_seq_params=documents())
    expected = [whole, *torch.autograd.grad(whole, tensors, seed(whole.shape[2]))]
    for rank, (out, grads) in enumerate(run_ranks(_attend_on_ranks, size, 2, kind)):
        local = cut_for(size, rank).local_indices
        for found, right in zip([out, *grads], expected, strict=True):
            torch.testing.assert_close(found, right[local], rtol=1e-11, atol=1e-12)


def test_attention_bias_is_refused():
    with pytest.raises(ValueError, match="bias"):
        make(4)(*inputs(4), None, attention_bias=torch.zeros(1), packed_seq_params=documents())
