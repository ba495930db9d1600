import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.batch.packed_documents import PackedDocuments, row_lengths


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_a_row_is_described_by_the_lengths_of_its_documents(lengths):
    packed = PackedDocuments.from_lengths(lengths, qkv_format="thd")
    assert packed.query_lengths == lengths
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for field in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert field.dtype == torch.int32 and field.tolist() == bounds
    assert packed.max_seqlen_q == packed.max_seqlen_kv == max(lengths)
    assert packed.qkv_format == "thd"
    positions = [at for length in lengths for at in range(length)]
    assert packed.position_ids is not None and packed.position_ids.tolist() == positions


def test_the_padding_of_each_pack_is_cut_in_pretend_documents():
    packs = torch.zeros(3, 600, dtype=torch.int64)
    packs[0, :2] = torch.tensor([70, 20])
    packs[1, 0] = 600
    assert row_lengths(packs) == [70, 20, 256, 254, 600, 256, 256, 88]
