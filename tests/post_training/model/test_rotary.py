import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from post_training.batch.packed_documents import PackedDocuments
from post_training.hf.rotary import RotaryScaling
from post_training.model.rotary import PackedRotaryEmbedding

LENGTHS = [5, 9, 2]


@pytest.fixture
def original():
    return RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True)


def packed(qkv_format="sbhd", lengths=LENGTHS):
    return PackedDocuments.from_lengths(lengths, qkv_format=qkv_format)


def test_positions_restart_at_every_document(original):
    """Reference's fault: RoPE positions run on through a pack."""
    table = original.get_emb(max(LENGTHS))
    angles = PackedRotaryEmbedding(original)(packed())
    assert angles.shape == (sum(LENGTHS), 1, 1, 8)
    for part, length in zip(angles.split(LENGTHS), LENGTHS, strict=True):
        assert torch.equal(part, table[:length])


def test_the_table_grows_with_the_longest_document(original):
    embedding = PackedRotaryEmbedding(original)
    short = embedding(packed(lengths=[3, 2]))
    long = embedding(packed(lengths=[3, 40]))
    assert torch.equal(short[:3], long[:3])
    assert torch.equal(long[3:], original.get_emb(40))


def test_other_frequencies_take_the_place_of_megatrons(original):
    frequencies = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    angles = PackedRotaryEmbedding(original, RotaryScaling(frequencies))(packed(lengths=[4]))
    expected = torch.outer(torch.arange(4.0), frequencies).repeat(1, 2)
    torch.testing.assert_close(angles[:, 0, 0], expected)


def test_documents_reach_the_embedding_only_where_it_looks_positions_up(original):
    embedding = PackedRotaryEmbedding(original)
    documents = packed()
    assert embedding.get_rotary_seq_len(None, None, None, None, documents) is documents
    thd = packed("thd")
    assert embedding.get_rotary_seq_len(None, None, None, None, thd) == max(LENGTHS)
    plain = original(7)
    assert torch.equal(embedding(7), plain)
