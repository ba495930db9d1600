"""Files that are there as a whole or not at all, and their check sums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from data.documents.cache_folder import machine
from data.documents.check_sum import check_sum
from data.errors import DataError

_MEND = "Copy it again from where it is whole, or remove the folder and extract its features again."


@dataclass(frozen=True)
class FileSum:
    """A file of a folder: its name there, its bytes and the CRC-32 of all of them."""

    file: str
    bytes: int
    crc32: int

    @staticmethod
    def of(folder: Path, file: str) -> FileSum:
        """Read a file."""
        return FileSum(file, (folder / file).stat().st_size, check_sum(folder / file, whole=True))

    def require(self, folder: Path, *, contents: bool) -> None:
        """Refuse a file that is not whole; with ``contents`` one whose bytes are others than were written.

        Raises:
            DataError: it is missing, or its size or check sum is another.
        """
        path = folder / self.file
        size = path.stat().st_size if path.is_file() else None
        if size != self.bytes:
            has = "is missing" if size is None else f"has {size:,} bytes"
            raise DataError(f"{path}: {has}; {self.bytes:,} bytes were written. {_MEND}")
        if contents and (found := check_sum(path, whole=True)) != self.crc32:
            raise DataError(
                f"{path}: changed or damaged: its check sum is {found:08x}, that of what was written "
                f"{self.crc32:08x}. {_MEND}"
            )


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.{machine()}-{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write tensors in the safetensors format, and return the CRC-32 of the file.

    The library's own ``save_file`` gives the file a passing name that a kill leaves behind, and lets nobody
    else read it.
    """
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return zlib.crc32(data)
