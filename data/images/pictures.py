"""Pictures as rows name them and as documents keep them: never as pixels.

What a row holds (a path, encoded bytes, a PIL picture, an Arrow struct, a data: URI) is read for its header
and its check sum. A document keeps where the encoded bytes lie; embedded ones are written once a chunk to
`--image-cache`, one file behind the other, under the hash of them all.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from data.errors import DataError, RowError
from data.images.layout import Grid, ImageLayout

# Modes whose conversion to RGB is what anybody sees; not CMYK and not 16 bits a channel.
_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"))
_ORIENTATION = 0x0112  # of EXIF; 1 is upright, 5 to 8 swap the sides
_JPEG_END = b"\xff\xd9"  # within the pixels it cannot stand; cameras may append what they like


class Picture(NamedTuple):
    """Where the encoded bytes of a picture lie.

    Attributes:
        file: An absolute path, or a name in the image cache.
        at: Where they begin in it.
        size: How many they are.
        digest: Hash of them, in hexadecimal digits.
        grid: Patches downwards and across.
    """

    file: str
    at: int
    size: int
    digest: str
    grid: Grid

    def read(self, cache: Path | None) -> bytes:
        """The encoded bytes.

        Args:
            cache: Folder of the image cache; an absolute path needs none.

        Raises:
            DataError: they are not there, or are others than when the rows were prepared.
        """
        path = Path(self.file)
        try:
            if path.is_absolute():
                data = path.read_bytes()
            else:
                assert cache is not None
                path = cache / path
                with path.open("rb") as file:
                    file.seek(self.at)
                    data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}). {_MEND}") from error
        if digest_of(data) != self.digest:
            raise DataError(f"{path}: changed or damaged since its row was prepared. {_MEND}")
        return data


_MEND = "Put it back as it was, or remove the token cache (see the log) and prepare again."


def digest_of(data: bytes) -> str:
    """The hash by which a picture is known."""
    return sha256(data).hexdigest()[:16]  # processors have instructions for it


@dataclass(frozen=True)
class PictureTable:
    """The pictures of documents, in the order of the documents.

    Attributes:
        lines: One JSON text a document with pictures, uint8 ``[bytes]``.
        sizes: Bytes of each document's text, 0 for none: int32 ``[documents]``.
    """

    lines: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.sizes, dtype=np.int64)

    def of(self, index: int) -> list[Picture]:
        """The pictures of a document."""
        end, size = int(self._ends[index]), int(self.sizes[index])
        if not size:
            return []
        found = json.loads(self.lines[end - size : end].tobytes())
        return [
            Picture(f, at, n, digest, (down, across)) for f, at, n, digest, (down, across) in found
        ]


@dataclass
class PictureReader:
    """Reads what rows name; keeps the embedded bytes of a chunk until they are written.

    Attributes:
        layout: Gives the grids.
        cache: Folder for embedded pictures; None where none are written, as in a preview.
    """

    layout: ImageLayout
    cache: Path | None = None
    _kept: dict[str, bytes] = field(default_factory=dict)

    def read(self, source: Any, beside: str) -> Picture:
        """Look at one picture.

        Args:
            source: What the row holds.
            beside: The file of the row, whose folder relative paths are meant in.

        Raises:
            RowError: it is missing, broken, or of a kind that is not taken.
        """
        path, data = encoded(source, beside)
        grid = self.layout.grid(*inspect(data))
        digest = digest_of(data)
        if path is None and self.cache is not None:
            self._kept.setdefault(digest, data)
        return Picture(str(path or ""), 0, len(data), digest, grid)

    def close_chunk(self, documents: Sequence[Sequence[Picture]]) -> tuple[bytes, list[int]]:
        """Write the embedded pictures of the documents of a chunk, each once.

        Returns:
            The texts of a `PictureTable` one behind the other, and the bytes of each.

        Raises:
            DataError: there is no image cache, or it cannot be written.
        """
        places: dict[str, int] = {}
        length = 0
        for picture in (picture for own in documents for picture in own if not picture.file):
            if picture.digest not in places:
                places[picture.digest] = length
                length += picture.size
        name = self._write({d: self._kept[d] for d in places}) if self.cache and places else ""
        self._kept = {}
        if places and not name:
            raise DataError("rows embed pictures: give --image-cache FOLDER to keep them in.")
        texts = []
        for own in documents:
            found = [p if p.file else p._replace(file=name, at=places[p.digest]) for p in own]
            texts.append(json.dumps(found).encode() if found else b"")
        return b"".join(texts), [len(text) for text in texts]

    def _write(self, kept: Mapping[str, bytes]) -> str:
        """Write pictures one behind the other, and return the file's name: a hash of their hashes."""
        assert self.cache is not None
        pictures = list(kept.values())
        name = sha256("".join(kept).encode()).hexdigest()[:32]
        target = self.cache / f"{name}.pictures"
        try:
            if not target.is_file() or target.stat().st_size != sum(map(len, pictures)):
                self.cache.mkdir(parents=True, exist_ok=True)
                passing = target.with_suffix(f".{os.getpid()}.tmp")
                with passing.open("wb") as file:
                    file.writelines(pictures)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(passing, target)
        except OSError as error:
            raise DataError(
                f"--image-cache {self.cache}: cannot be written ({error}). Free some space, or give "
                "another folder."
            ) from error
        return target.name


def encoded(source: Any, beside: str) -> tuple[Path | None, bytes]:
    """The file of a picture, None for an embedded one, and its encoded bytes.

    Raises:
        RowError: there is none, or nothing here reads it.
    """
    if isinstance(source, Mapping):
        data, name = source.get("bytes"), source.get("path")
        if data is None and name is None:
            raise RowError("no picture", f"an object with the keys {', '.join(map(str, source))}")
        source = name if data is None else data
    if isinstance(source, (bytes, bytearray, memoryview)):
        return None, bytes(source)
    if hasattr(source, "save") and hasattr(source, "getexif"):  # of PIL
        return None, _png(source)
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise RowError(
            "no picture", f"{type(source).__name__}, expected a path, bytes or an object"
        )
    text = str(source)
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return None, base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise RowError("broken picture", f"{head[:40]}: {error}") from error
    if "://" in text:
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise RowError("no picture", f"{text[:120]!r}: {error}") from error
        if parts.scheme != "file":
            raise RowError(
                "picture elsewhere",
                f"{text[:120]}: nothing is fetched; download the pictures and give their paths",
            )
        text = unquote(parts.path)
    path = Path(text) if Path(text).is_absolute() else Path(beside).resolve().parent / text
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise RowError("no picture", f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # what no path may hold, such as a zero
        raise RowError("no picture", f"{text[:120]!r}: {error}") from error


def _png(image: Any) -> bytes:
    """A PIL picture as it is shown, encoded without loss: what EXIF says of it is not kept beside it.

    Raises:
        RowError: it is broken, or of a kind that is not taken.
    """
    from PIL import ImageOps

    _check_mode(image)
    out = io.BytesIO()
    try:
        shown = ImageOps.exif_transpose(image)
        known = {"YCbCr": "RGB", "RGBX": "RGB", "PA": "RGBA"}  # to PNG
        (shown.convert(known[shown.mode]) if shown.mode in known else shown).save(out, "PNG")
    except Exception as error:  # whatever a file that it still reads is made of
        raise RowError("broken picture", f"it cannot be decoded ({error})") from error
    return out.getvalue()


def _check_mode(image: Any) -> None:
    if image.mode not in _MODES:
        raise RowError(
            "bad picture", f"of mode {image.mode}; save it as RGB ({image.format}, {image.size})"
        )


def inspect(data: bytes) -> tuple[int, int]:
    """Height and width as a picture is shown, from its header; no pixel is decoded.

    Raises:
        RowError: it is broken, or of a kind that is not taken.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Any = Image.open(io.BytesIO(data))
        # A camera's MPO is a JPEG with further views behind it.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise RowError(
                "bad picture", f"animated, of {image.n_frames} pictures: give one of them"
            )
        _check_mode(image)
        width, height = image.size
        if image.format != "TIFF" and _orientation(image) > 4:  # whose reader has turned it
            width, height = height, width
        if image.format == "JPEG" and data.rfind(_JPEG_END) < len(data) // 2:
            raise RowError("broken picture", "this JPEG ends too early")
        if image.format == "PNG":
            image.verify()  # the check sums of its parts
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("bad picture", f"too large: {error}") from error
    except RowError:
        raise
    except Exception as error:  # whatever the format's reader makes of damaged bytes
        raise RowError("broken picture", f"{len(data)} bytes: {error}") from error
    if not width or not height:
        raise RowError("broken picture", "it has no pixels")
    return height, width


def open_picture(data: bytes) -> Any:
    """The picture as it is shown: a PIL image of mode RGB, what is transparent on white.

    (As processors of transformers 5 take a PIL picture, and as qwen-vl-utils does.)

    Raises:
        OSError: it cannot be decoded.
    """
    from PIL import Image, ImageOps

    image: Any = Image.open(io.BytesIO(data))
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def thumbnail(source: Any, beside: str, side: int = 240) -> str:
    """A picture as an element of an HTML page, of a few kilobytes.

    Args:
        source: What the row holds.
        beside: The file of the row.
        side: Its height and width at most, in pixels.
    """
    try:
        _, data = encoded(source, beside)
        height, width = inspect(data)
        image = open_picture(data)
    except (RowError, OSError, SyntaxError, ValueError) as error:
        return f"<em>{html.escape(str(error))}</em>"
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    text = base64.b64encode(out.getvalue()).decode()
    return f"<img alt='picture' title='{width} x {height}' src='data:image/jpeg;base64,{text}'>"


def _orientation(image: Any) -> int:
    """How the camera was held, as EXIF says it; of PNG files only what stands before the pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1
