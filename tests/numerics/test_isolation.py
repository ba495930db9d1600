"""The canary: a pack of two documents; changing one leaves the other's losses bit-identical.

Reference's fault: documents in a pack attend to each other, and RoPE positions run on.
"""

import pytest
import torch

from tests.helpers import megatron_model
from tests.helpers.launch import run_ranks
from tests.helpers.models import VOCABULARY
from tests.helpers.packs import make_pack, stacked

A, B = 40, 24


def document(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def pack(*documents: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.cat(documents)
    mask = torch.ones(len(ids), dtype=torch.uint8)
    return make_pack(ids, mask, [len(document) for document in documents])


def micro_batches(packs: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    return [stacked(packs[i : i + size]) for i in range(0, len(packs), size)]


@pytest.mark.parametrize(
    ("layout", "world", "micro"),
    [
        ([], 1, 1),
        ([], 1, 4),
        (["--tensor-model-parallel-size", "2"], 2, 1),
        (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2, 1),
        (["--pipeline-model-parallel-size", "2"], 2, 1),
        (["--pipeline-model-parallel-size", "2"], 2, 2),
        (["--context-parallel-size", "2"], 2, 1),
        (["--context-parallel-size", "2"], 2, 2),
    ],
    ids=["one", "mbs4", "tp2", "tp2-sp", "pp2", "pp2-mbs2", "cp2", "cp2-mbs2"],
)
def test_a_changed_document_leaves_the_other_bit_identical(
    hf_model, tmp_path, layout, world, micro
):
    first, second = document(A, 1), document(B, 2)
    packs = [
        pack(first, second),
        pack(document(A, 3), second),
        pack(first, document(B, 4)),
        pack(document(A, 5), document(B, 6)),
    ]
    argv = megatron_model.flags(
        str(hf_model("llama")),
        str(tmp_path / "out"),
        *("--micro-batch-size", str(micro), "--global-batch-size", "4", *layout),
    )
    answers = run_ranks(megatron_model.token_losses, world, argv, micro_batches(packs, micro))
    losses = torch.cat(next(answer for answer in answers if answer is not None))
    # The last token of a document has no label.
    by_pack = losses.view(4, A - 1 + B - 1)
    one, two = by_pack[:, : A - 1], by_pack[:, A - 1 :]
    equal = torch.equal
    assert equal(two[0], two[1]), "B moved when A was changed"
    assert equal(one[0], one[2]), "A moved when B was changed"
    assert not equal(one[0], one[1]) and not equal(two[0], two[2])
