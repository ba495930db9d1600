"""Documents without a tokenizer, and features that tell document, row and column."""

from hashlib import blake2b

import numpy as np
import torch

from data.documents.documents import Documents
from data.features.manifest import DTYPES, hidden_fields, rows_per_document, top_k_fields
from data.features.writer import FeatureWriter

HIDDEN = 4
FIELDS = [*hidden_fields(HIDDEN, "fp32"), *top_k_fields(2, "fp32")]
MADE_BY = {"base": "b1", "tokenizer": "t1", "template": "c1", "aux_layers": [0, 1, 2]}
SHARD_BYTES = 6000


def make_documents(count=40, seed=0, source="rows.jsonl"):
    """Of 2 to 20 tokens; some are trained from their first token on, some nowhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 21, count)
    ids = [rng.integers(0, 500, n).astype(np.int32) for n in lengths]
    masks = [(np.arange(n) >= rng.integers(0, n + 1)).astype(np.uint8) for n in lengths]
    masks[0][:], masks[1][:] = 1, 0
    return Documents(
        input_ids=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        provenance=np.array([[0, i] for i in range(count)], np.int64),
        hashes=np.array(
            [int.from_bytes(blake2b(d, digest_size=8).digest(), "little") for d in ids], np.uint64
        ),
        fingerprint="",
        report={"sources": [source], "max_token_id": 499, "read": count, "dropped": {}},
    )


def states(documents, document, field):
    """The field of a document, [rows, width]: no two numbers of a field are equal."""
    rows = int(rows_per_document(documents)[field.per][document])
    number = (document * 32 + torch.arange(rows))[:, None] * field.width + torch.arange(field.width)
    return number.to(DTYPES[field.dtype]) + 1


def shard_tensors(writer, shard):
    return {
        field.name: torch.cat(
            [states(writer.documents, document, field) for document in writer.documents_of(shard)]
        )
        for field in writer.fields.values()
    }


def write(folder, documents, fields=FIELDS, made_by=MADE_BY, shard_bytes=SHARD_BYTES):
    writer = FeatureWriter(folder, documents, fields, made_by, shard_bytes)
    for shard in writer.pending():
        writer.write(shard, shard_tensors(writer, shard))
    writer.finish()
    return writer


def tree(folder):
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
