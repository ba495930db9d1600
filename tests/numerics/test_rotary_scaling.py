"""Scaled rotary embeddings against `transformers`: packs of documents on both sides of the original length.

The frequencies of `dynamic` and `longrope` depend on the length of a document. One table for a whole pack
is wrong by 67 and 100 % of the logits' norm for those beyond the original length, and nothing says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks
from tests.helpers.models import VOCABULARY, load_model
from tests.helpers.packs import make_pack, stacked
from tests.helpers.reference import document_losses

ORIGINAL = 40
LENGTHS = [24, ORIGINAL, ORIGINAL + 1, 87]
BASE = {"rope_theta": 10000.0, "factor": 4.0}
GROWN = {**BASE, "original_max_position_embeddings": ORIGINAL}
# By name: the family, its rotary parameters and max_position_embeddings.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "yarn": ("qwen3", {"rope_type": "yarn", **GROWN}, 160),
    "yarn-some-layers": (
        "smollm3",
        {"rope_type": "yarn", **GROWN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
        160,
    ),
    "dynamic": ("llama", {"rope_type": "dynamic", **BASE}, ORIGINAL),
    "dynamic-interleaved": ("ernie4_5", {"rope_type": "dynamic", **BASE}, ORIGINAL),
    "longrope": (
        "llama",
        {
            "rope_type": "longrope",
            **GROWN,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.5 + 2.0 * i for i in range(8)],
        },
        160,
    ),
}
CP2 = ("--context-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")


@pytest.fixture
def folder(hf_model: Any, name: str) -> Path:
    family, rope, longest = MODELS[name]
    made: Path = hf_model(family, rope_parameters=rope, max_position_embeddings=longest)
    return made


def document(length: int) -> Tensor:
    return torch.randint(
        0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1000 + length)
    )


def theirs(folder: Path, ids: Tensor) -> Tensor:
    """Logits of one document; of a fresh model, since `dynamic` remembers the longest call before."""
    with torch.no_grad():
        logits: Tensor = load_model(folder)(ids.unsqueeze(0), use_cache=False).logits[0]
    return logits


def _ours(folder: str, prompt: list[int], new: int) -> tuple[Tensor, list[Tensor], list[int]]:
    """Logits of the pack and of each document alone, and a continuation of `prompt`; one rank."""
    from model_provider import model_config
    from post_training.batch.packed_documents import PackedDocuments
    from post_training.inference.generate import Sampling, generate
    from post_training.inference.load import load_model

    loaded = load_model(model_config, hf_model=folder)
    packed = PackedDocuments.from_lengths(LENGTHS, qkv_format="sbhd")
    documents = [document(length) for length in LENGTHS]
    assert packed.position_ids is not None
    with torch.no_grad():
        row = torch.cat(documents).unsqueeze(0)
        together = loaded.model(
            row, packed.position_ids.unsqueeze(0), None, packed_seq_params=packed
        )
        alone = [
            loaded.model(ids.unsqueeze(0), torch.arange(len(ids)).unsqueeze(0), None)[0]
            for ids in documents
        ]
    (answer,) = generate(loaded, [prompt], Sampling(max_new_tokens=new), set())
    return together[0], alone, answer


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_answers_are_those_of_transformers(folder: Path) -> None:
    prompt = document(30).tolist()
    together, alone, answer = run_rank(_ours, str(folder), prompt, 24)
    for found, length, packed in zip(alone, LENGTHS, together.split(LENGTHS), strict=True):
        expected = theirs(folder, document(length))
        for logits in (found, packed):
            error = (logits[:, :VOCABULARY] - expected).norm() / expected.norm()
            assert error < 5e-6, (length, error)
    # The answer begins within the original length and ends beyond it.
    model: Any = load_model(folder)
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1
    )
    assert answer == written[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "layout"), [("dynamic", CP2), ("longrope", PP2), ("yarn", TP2)])
def test_losses_of_each_layout_are_those_of_transformers(
    folder: Path, tmp_path: Path, layout: Sequence[str]
) -> None:
    documents = [document(length) for length in LENGTHS]
    ids = torch.cat(documents)
    packs = [stacked([make_pack(ids, torch.ones_like(ids), LENGTHS)])]
    argv = megatron_model.flags(
        str(folder), str(tmp_path / "out"), "--seq-length", str(len(ids)), *layout
    )
    answers = run_ranks(megatron_model.token_losses, 2, argv, packs)
    (found,) = next(answer for answer in answers if answer is not None)
    expected = [
        document_losses(load_model(folder), each, torch.ones_like(each)).detach()
        for each in documents
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
