"""Architectures of many parts: isolation, checkpoints of another layout, generation."""

import pytest
import torch

from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks
from tests.helpers.models import VOCABULARY, load_model
from tests.helpers.packs import stacked
from tests.numerics.test_isolation import document, pack
from tests.post_training.hf.test_weights import assert_bit_exact

pytestmark = pytest.mark.slow
FAMILIES = ["deepseek_v3", "gpt_oss", "nemotron_h"]
WITHOUT_EXPERTS = ["mamba2", "granite", "glm4", "phi3"]
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP2 = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")


def _losses(argv, packs):
    """Of two packs; the second pass repeats the experts of the first, as the isolation check does."""
    from post_training.model.router import same_experts

    ready = megatron_model.set_up(argv)
    megatron_model.set_up = lambda argv: ready
    with same_experts(ready[1][0]):
        return [megatron_model.token_losses(argv, [each]) for each in packs]


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_EXPERTS])
def test_a_changed_document_leaves_the_other_bit_identical(hf_model, tmp_path, family):
    second = document(24, 2)
    packs = [stacked([pack(document(40, seed), second)]) for seed in (1, 3)]
    argv = megatron_model.flags(
        *(str(hf_model(family)), str(tmp_path / "out"), "--global-batch-size", "1", *TP2),
        *(() if family in WITHOUT_EXPERTS else EP2),
    )
    (first,), (changed,) = run_ranks(_losses, 2, argv, packs)[0]
    assert torch.equal(first[39:], changed[39:]) and not torch.equal(first[:39], changed[:39])


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_EXPERTS])
def test_checkpoints_are_read_in_another_layout(hf_model, tmp_path, family):
    """Written by TP 2 x SP x EP 2 and read by one process, and the other way."""
    folder = hf_model(family)
    cut = TP2 if family in WITHOUT_EXPERTS else (*TP2, *EP2)
    two, one = (
        megatron_model.flags(str(folder), str(tmp_path / name), *more)
        for name, more in (("two", cut), ("one", ()))
    )
    run_ranks(megatron_model.save, 2, two)
    words = megatron_model.flags(str(folder), str(tmp_path / "two"), "--no-load-optim")
    assert_bit_exact(run_rank(megatron_model.exported, words), folder)
    run_rank(megatron_model.save, one)
    words = megatron_model.flags(str(folder), str(tmp_path / "one"), "--no-load-optim", *cut)
    run_ranks(_saved_again, 2, words, str(tmp_path / "again"))
    words = megatron_model.flags(str(folder), str(tmp_path / "again"), "--no-load-optim")
    assert_bit_exact(run_rank(megatron_model.exported, words), folder)


def _saved_again(argv, output):
    """Read a checkpoint and write it to another folder."""
    args, (chunks, _, _) = megatron_model.set_up(argv)
    args.save = f"{output}/checkpoints"
    megatron_model.save_weights(args, chunks)


def _answer(folder, prompt, new):
    from model_provider import model_config
    from post_training.inference.generate import Sampling, generate
    from post_training.inference.load import load_model as load

    return generate(
        load(model_config, hf_model=folder), [prompt], Sampling(max_new_tokens=new), set()
    )[0]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((f, {}) for f in (*FAMILIES, *WITHOUT_EXPERTS)),
        ("mistral", {"sliding_window": 24}),
    ],
)
def test_answers_are_those_of_transformers(hf_model, family, options):
    """Prompt and answer are longer than the windows.

    Without its cache: with it transformers 5.24 forgets the limit of the steps of Nemotron-H.
    """
    folder = hf_model(family, **options)
    prompt = torch.randint(
        0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(5)
    ).tolist()
    written = load_model(folder).generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=-1, use_cache=False
    )
    assert run_rank(_answer, str(folder), prompt, 16) == written[0, len(prompt) :].tolist()
