from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from post_training.model.norm import LatentNorm
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank, run_ranks
from tests.helpers.models import VOCABULARY

IDS = torch.randint(0, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(0))
LENGTHS = [20, 28]


def _gradients(argv: list[str], packs: bool) -> tuple[list[Tensor], str]:
    """Of this rank's part of the first layer's `linear_kv_down_proj`: as mended and as upstream has it; and
    what upstream says to a pack."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from post_training.batch.packed_documents import PackedDocuments

    _, built = megatron_model.set_up(argv)
    model = megatron_model.unwrapped(built).train()
    weight = model.decoder.layers[0].self_attention.linear_kv_down_proj.weight
    name = "get_query_key_value_tensors"
    found = []
    for function in (getattr(MLASelfAttention, name), getattr(MLASelfAttention, name).__wrapped__):
        setattr(MLASelfAttention, name, function)
        built[0][0].zero_grad_buffer()
        logits = model(IDS, torch.arange(IDS.shape[1]).unsqueeze(0), None)
        logits.square().sum().backward()
        found.append(weight.main_grad.clone())
    packed = PackedDocuments.from_lengths(LENGTHS, qkv_format="sbhd")
    told = ""
    if packs:
        try:
            model(IDS, packed.position_ids, None, packed_seq_params=packed)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            told = type(error).__name__
    return found, told


@pytest.mark.slow
def test_gradients_under_tensor_parallelism_and_still_needed_upstream(hf_model, tmp_path):
    """Megatron-LM#1699."""
    folder = str(hf_model("deepseek_v3"))
    (right, also_right), told = run_rank(
        _gradients, megatron_model.flags(folder, str(tmp_path / "one")), True
    )
    assert told, "upstream takes packs without Transformer Engine"
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    ranks = run_ranks(
        _gradients, 2, megatron_model.flags(folder, str(tmp_path / "two"), *layout), False
    )
    mended, upstream = (torch.cat(parts) for parts in zip(*(f for f, _ in ranks), strict=True))
    assert (mended - right).norm() < 1e-5 * right.norm()
    assert (upstream - also_right).norm() > 0.01 * also_right.norm(), "upstream is right by now"


def test_queries_without_a_latent_vector_still_cannot_be_built_upstream():
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

    config = SimpleNamespace(
        transformer_impl="local", normalization="RMSNorm", qk_l2_norm=False, qk_layernorm=True
    )
    config.q_lora_rank, config.experimental_attention_variant = None, None
    parts = MLASelfAttentionSubmodules(
        linear_proj=RowParallelLinear, q_layernorm=IdentityOp, kv_layernorm=LatentNorm
    )
    mended = QKNormConfigResolver._mla_fused_linear_or_default
    assert QKNormConfigResolver(config, parts).resolve()["linear_q_proj"] is not None
    with pytest.raises(RuntimeError, match="linear_q_proj"):
        mended.__wrapped__(QKNormConfigResolver(config, parts), None, "linear_q_proj")
