"""Reads a folder with one ``.pt`` file a sample, as ModelOpt's dumper and Megatron-LM's example write them.

Both write ``input_ids``, ``hidden_states`` and ``aux_hidden_states``; ModelOpt's also ``loss_mask``,
``conversation_id`` and ``hidden_states_prenorm`` (``OfflineSupervisedDataset`` of modelopt 0.47,
``modelopt/torch/speculative/eagle/utils.py``, reads them; ``offline_feature_extract.py`` of Megatron-LM's
``examples/post_training/modelopt``). One file is one document: where it holds several conversations, these
have seen each other in what made it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.documents.cache_build import MemorySink
from data.documents.shard import Shard
from data.errors import DataError
from data.features.manifest import DTYPES, Field

_DTYPES = {dtype: name for name, dtype in DTYPES.items() if dtype.is_floating_point}
HIDDEN = ("hidden_states", "aux_hidden_states")


class SampleFiles:
    """Documents and hidden states of the ``.pt`` files of a folder, by name.

    Every file is opened once at the start, for its ids and mask; hidden states are mapped when they
    are read. Without a mask every token is trained, as there.

    Args:
        folder: With the files.

    Raises:
        DataError: no files, or one that cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.made_by: dict[str, Any] | None = None
        self.files = sorted(self.folder.glob("*.pt"))
        if not self.files:
            raise DataError(f"{self.folder}: holds no .pt files. Give a folder of features.")
        self.fields: dict[str, Field] = {}
        ids, masks = [], []
        for path in self.files:
            sample = self._load(path)
            ids.append(_input_ids(path, sample))
            masks.append(_loss_mask(path, sample, ids[-1]))
            self._check_fields(path, sample, len(ids[-1]))
        if not any(mask[1:].any() for mask in masks):
            raise DataError(f"{self.folder}: loss_mask of no file has a token that is trained.")
        hashes = b"".join(blake2b(document, digest_size=8).digest() for document in ids)
        tokens, trained = np.concatenate(ids), np.concatenate(masks)
        counts = {"read": len(ids), "kept": len(ids), "tokens": len(tokens)}
        counts |= {"trained tokens": int(trained.sum()), "max token id": int(tokens.max())}
        sink = MemorySink()
        sink.add(
            Shard(
                input_ids=tokens,
                loss_mask=trained,
                lengths=np.array([len(document) for document in ids]),
                provenance=np.array([[number, 0] for number in range(len(ids))], np.int64),
                hashes=np.frombuffer(hashes, np.uint64),
                counts=counts,
                bad_rows=[],
            )
        )
        self.documents = sink.documents("")
        self.documents.report.update(sources=[str(path) for path in self.files], warnings=[])

    def read(self, document: int, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The fields of a document, or those of ``names``, each ``[tokens, width]``: views of its file."""
        path = self.files[document]
        sample = self._load(path)
        self._check_fields(path, sample, len(self.documents[document][0]))
        return {name: _flat(sample[name], 2) for name in (self.fields if names is None else names)}

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            sample = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _bad(path, f"cannot be read ({reason})") from error
        if not isinstance(sample, dict):
            raise _bad(path, f"holds a {type(sample).__name__}, no dictionary of tensors")
        prenorm = sample.get("hidden_states_prenorm")
        if isinstance(prenorm, torch.Tensor) and prenorm.numel() != 1:
            raise _bad(path, "hidden_states_prenorm is neither true nor false")
        if prenorm:
            raise _bad(path, "its hidden states are those before the final norm")
        return sample

    def _check_fields(self, path: Path, sample: dict[str, Any], tokens: int) -> None:
        """Every file has to hold the fields of the first, with a row for each token."""
        found = {}
        for name in HIDDEN:
            if sample.get(name) is None:
                continue
            states = _tensor(path, sample, name, 2)
            dtype = _DTYPES.get(states.dtype)
            if dtype is None:
                raise _bad(path, f"{name} is {states.dtype}, not float32, bfloat16 or float16")
            if len(states) != tokens:
                raise _bad(path, f"{name} has {len(states)} rows for {tokens} tokens")
            found[name] = Field(name, states.shape[1], dtype)
        if not found:
            raise _bad(path, f"holds none of {', '.join(HIDDEN)}")
        if not self.fields:
            self.fields = found
        if found != self.fields:
            shown = [
                ", ".join(f"{n} {f}" for n, f in each.items()) for each in (found, self.fields)
            ]
            raise _bad(path, f"has {shown[0]}, where {self.files[0].name} has {shown[1]}")


def _bad(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}. Write the file again, or take it out of the folder.")


def _flat(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """Without the batch dimension of 1 that a dumper may leave in front."""
    return tensor.squeeze(0) if tensor.dim() == dims + 1 and len(tensor) == 1 else tensor


def _tensor(path: Path, sample: dict[str, Any], name: str, dims: int) -> torch.Tensor:
    tensor = sample.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise _bad(path, f"{name} is missing" if tensor is None else f"{name} is no tensor")
    tensor = _flat(tensor, dims)
    if tensor.dim() != dims or not tensor.numel():
        raise _bad(path, f"{name} has the shape {list(tensor.shape)}, not {dims} dimensions")
    return tensor


def _input_ids(path: Path, sample: dict[str, Any]) -> npt.NDArray[np.int32]:
    ids = _tensor(path, sample, "input_ids", 1)
    known = ids.dtype in (torch.int64, torch.int32)
    if not known or int(ids.min()) < 0 or int(ids.max()) >= 1 << 31:
        raise _bad(path, "input_ids are no token ids")
    return np.array(ids.numpy(), np.int32)


def _loss_mask(
    path: Path, sample: dict[str, Any], ids: npt.NDArray[np.int32]
) -> npt.NDArray[np.uint8]:
    """1 where the token itself is trained; everywhere without a mask."""
    if "loss_mask" not in sample:
        if "labels" in sample:
            raise _bad(path, "has labels and no loss_mask, which says what is trained")
        return np.ones(len(ids), np.uint8)
    mask = _tensor(path, sample, "loss_mask", 1)
    if len(mask) != len(ids) or not ((mask == 0) | (mask == 1)).all():
        raise _bad(path, f"loss_mask is not 0 or 1 for each of {len(ids)} tokens")
    return mask.to(torch.uint8).numpy()
