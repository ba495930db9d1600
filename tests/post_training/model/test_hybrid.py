"""The residual stream of Mamba 2, which transformers keeps in fp32 beside layers in bf16."""

import pytest
import torch

from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks
from tests.helpers.models import VOCABULARY, load_model
from tests.helpers.packs import stacked
from tests.numerics.test_isolation import document, pack

PP2 = ("--bf16", "--global-batch-size", "1", "--pipeline-model-parallel-size", "2")


def _streams(argv, ids):
    """Logits, and the precision of what each layer gives to the next."""
    seen = []
    ready = megatron_model.set_up(argv)
    for layer in megatron_model.unwrapped(ready[1]).decoder.layers:
        layer.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
    megatron_model.set_up = lambda argv: ready
    return megatron_model.logits(argv, ids), seen


@pytest.mark.parametrize("kept", [True, False])
def test_residuals_are_kept_in_the_precision_that_the_configuration_says(hf_model, tmp_path, kept):
    folder = hf_model("mamba2", residual_in_fp32=kept)
    ids = torch.randint(0, VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
    argv = megatron_model.flags(str(folder), str(tmp_path / "out"), "--bf16")
    logits, streams = run_rank(_streams, argv, ids)
    assert streams == [torch.float32 if kept else torch.bfloat16] * 2
    with torch.no_grad():
        expected = load_model(folder).bfloat16()(ids[None]).logits[0]
    error = (logits[:, :VOCABULARY] - expected).float().norm() / expected.float().norm()
    assert error < 0.02, "about as far as transformers in bf16 is from itself in fp32"


def test_stages_send_them_in_fp32(hf_model, tmp_path):
    """One process computes the same, bit for bit."""
    words = megatron_model.flags(str(hf_model("mamba2")), str(tmp_path / "out"), *PP2[:3])
    packs = [stacked([pack(document(40, 1), document(24, 2))])]
    (one,) = run_rank(megatron_model.token_losses, words, packs)
    _, (two,) = run_ranks(megatron_model.token_losses, 2, [*words, *PP2[3:]], packs)
    assert torch.equal(one, two)
