"""Drafts against EAGLE-3 in plain PyTorch, over layouts, and apart from their neighbours in a pack."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.launch import run_ranks
from tests.helpers.megatron_model import flags
from tests.helpers.models import VOCABULARY, load_model
from tests.helpers.packs import make_pack, stacked
from tests.helpers.plain_eagle import PlainEagle

STEPS = 4
LENGTHS = (20, 31)
TP2 = ["--tensor-model-parallel-size", "2"]


def draft_of_packs(argv, packs, cut, detach=False):
    """Losses and gradients of an untrained draft; one tensor parallel group.

    Returns:
        Of each pack: losses, what counts of them, and (with one rank) gradients under the names of servers;
        the draft's weights, its config.json and its tokens.
    """
    from post_training.batch.assemble import assemble_batch
    from post_training.distillation import draft_forward, draft_model
    from post_training.hf.draft import DraftShape, aux_layers, draft_config
    from post_training.hf.weights import split_parameter
    from tests.helpers.megatron_model import set_up, unwrapped

    args, built = set_up(argv)
    model = unwrapped(built)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randperm(VOCABULARY, generator=generator)[:cut].sort()[0] if cut else None
    shape = DraftShape.of(args.hf_config, cut)
    settings = draft_model.DraftSettings(aux_layers(None, 2), VOCABULARY, STEPS, detach=detach)
    draft_model.add_draft(model, shape, settings, tokens=tokens)
    draft_forward.install_forward(model, settings)
    weights = {
        name: (model.eagle_module.get_parameter(name), weight)
        for name, weight in shape.weights().items()
    }
    with torch.no_grad():
        for parameter, _ in weights.values():  # norms that are not all alike
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2, generator=generator)
    served: dict[str, torch.Tensor] = {}
    if args.tensor_model_parallel_size == 1:
        for parameter, weight in weights.values():
            served |= {n: v.clone() for n, v in split_parameter(weight, parameter.detach())}
    answers = []
    for pack in packs:
        batch = assemble_batch(stacked([pack]), qkv_format="sbhd")
        inputs = batch.tokens, batch.position_ids, None
        states = draft_forward.base_states(
            model, settings.aux_layers, *inputs, packed_seq_params=batch.packed
        )
        model.zero_grad()
        saved: list[torch.Tensor] = []

        def keep(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            losses, counted, _ = model.draft.losses(
                model, batch.tokens, batch.packed, batch.trained, states
            )
        rows = len(model.eagle_module.eagle_output_layer.weight)
        kept = {x.data_ptr() for x in saved if x.shape == (losses.shape[1], rows)}
        assert len(kept) == 1, "more than the teacher's logits: memory grows with the steps"
        (losses * counted).sum().backward()
        gradients: dict[str, torch.Tensor] = {}
        if args.tensor_model_parallel_size == 1:
            for parameter, weight in weights.values():
                gradients |= dict(split_parameter(weight, parameter.grad))
        answers.append((losses.detach().clone(), counted.clone(), gradients))
    return (
        answers,
        served,
        draft_config(args.hf_config, shape, settings.aux_layers, "float32"),
        tokens,
    )


def _packs():
    """Two packs of two documents each; the first documents differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (64,), generator=generator)
    mask = (torch.rand(64, generator=generator) > 0.4).long()
    mask[[0, 1, LENGTHS[0]]] = 0
    mask[sum(LENGTHS) :] = 0
    other = ids.clone()
    other[: LENGTHS[0]] = torch.randint(3, VOCABULARY, (LENGTHS[0],), generator=generator)
    return make_pack(ids, mask, LENGTHS), make_pack(other, mask, LENGTHS)


def _plain(folder, pack, served, config, tokens, detach):
    """The same of each document alone: summed losses of each step, and the tensors with gradients."""
    tensors = {name: value.clone().requires_grad_() for name, value in served.items()}
    base = load_model(folder)
    before_norm = []
    base.model.layers[-1].register_forward_hook(lambda m, a, out: before_norm.append(out))
    plain = PlainEagle(tensors, config, base.get_input_embeddings().weight.detach())
    total, begin = torch.zeros(STEPS), 0
    for length in LENGTHS:
        ids, mask = (pack[n][begin : begin + length] for n in ("input_ids", "loss_mask"))
        with torch.no_grad():
            out = base(ids[None], output_hidden_states=True)
        states = [*out.hidden_states[:2], before_norm.pop().view(1, length, -1)]
        logits = out.logits[0] if tokens is None else out.logits[0][:, tokens]
        total = total + plain.losses(ids, mask, torch.cat(states, -1)[0], logits, STEPS, detach)
        begin += length
    total.sum().backward()
    return total.detach(), tensors


@pytest.mark.slow
def test_a_draft_is_eagle_3_of_each_document(hf_model, tmp_path):
    """Losses and gradients, of the whole vocabulary and a part, of steps apart (`--draft-detach-steps`).

    A changed neighbour moves no bit.
    """
    rope = {"rope_type": "default", "rope_theta": 100.0}
    folder = hf_model("qwen3", tied=True, rope_parameters=rope)
    pack, other = _packs()
    argv = flags(str(folder), str(tmp_path), "--fp32")
    for cut, detach in ((None, False), (100, False), (None, True)):
        ((answers, served, config, tokens),) = run_ranks(
            draft_of_packs, 1, argv, [pack, other], cut, detach
        )
        losses, counted, gradients = answers[0]
        expected, tensors = _plain(folder, pack, served, config, tokens, detach)
        torch.testing.assert_close((losses * counted).sum(1), expected, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            wanted = tensors[name].grad
            assert wanted is not None and wanted.norm() > 1e-3, name
            assert (gradient - wanted).norm() / wanted.norm() < 1e-5, name
        first = int(pack["loss_mask"][1 : LENGTHS[0]].sum())
        here, there = (losses * counted for losses, counted, _ in answers)
        assert torch.equal(here[:, first:], there[:, first:])
        assert not torch.equal(here[:, :first], there[:, :first])


@pytest.mark.slow
def test_a_draft_is_the_same_on_every_tensor_parallel_layout(hf_model, tmp_path):
    folder, packs = hf_model("qwen3", tied=True), list(_packs())
    for cut in (None, 100):
        alone, *_ = run_ranks(
            draft_of_packs, 1, flags(str(folder), str(tmp_path), "--fp32"), packs, cut
        )[0]
        for layout in (TP2, [*TP2, "--sequence-parallel"]):
            argv = flags(str(folder), str(tmp_path), "--fp32", *layout)
            for found, *_ in run_ranks(draft_of_packs, 2, argv, packs, cut):
                for (losses, counted, _), (wanted, weights, _) in zip(found, alone, strict=True):
                    assert torch.equal(counted, weights)
                    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
