import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from post_training.packed_sequences import PackedDocuments


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_documents_are_found_from_position_ids(lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = PackedDocuments.from_position_ids(positions, qkv_format="thd")
    assert packed.query_lengths == lengths
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for field in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert field.dtype == torch.int32 and field.tolist() == bounds
    assert packed.max_seqlen_q == packed.max_seqlen_kv == max(lengths)
    assert packed.qkv_format == "thd"
    assert packed.position_ids is positions
