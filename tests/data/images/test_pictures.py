import base64
import io
import os

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from data.errors import DataError, RowError
from data.images.layout import ImageLayout
from data.images.pictures import (
    PictureReader,
    PictureTable,
    encoded,
    inspect,
    open_picture,
    thumbnail,
)
from tests.helpers.vision import picture

LAYOUT = ImageLayout("x", 8, 2, 256, 1 << 20, 3)
PNG = picture(0, 40, 24)


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width, height, mode="RGB"):
    return Image.open(io.BytesIO(picture(1, width, height))).convert(mode)


def test_every_kind_of_source_is_the_same_picture(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    row_file = str(tmp_path / "rows.jsonl")
    sources = [
        "a b.png",
        str(tmp_path / "a b.png"),
        (tmp_path / "a b.png").as_uri(),
        PNG,
        {"bytes": PNG, "path": "elsewhere.png"},
        {"bytes": None, "path": "a b.png"},
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        Image.open(io.BytesIO(PNG)),
    ]
    reader = PictureReader(LAYOUT, tmp_path / "cache")
    found = [reader.read(source, row_file) for source in sources]
    assert {picture.grid for picture in found} == {LAYOUT.grid(24, 40)}
    assert len({picture.digest for picture in found[:-1]}) == 1
    lines, sizes = reader.close_chunk([found[:2], [], found[2:7]])
    table = PictureTable(np.frombuffer(lines, np.uint8), np.array(sizes, np.int32))
    again = [*table.of(0), *table.of(1), *table.of(2)]
    assert len(again) == 7
    assert all(picture.read(tmp_path / "cache") == PNG for picture in again)
    # The cache has what is embedded, each once and encoded as it was.
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == len(PNG)
    (tmp_path / "a b.png").write_bytes(PNG + b"more")
    with pytest.raises(DataError, match="changed or damaged"):
        again[0].read(None)


CMYK = saved(noise(30, 30, "CMYK"), "JPEG")
GIF = saved(noise(30, 30), "GIF", save_all=True, append_images=[noise(20, 30)])
JPEG = saved(noise(60, 60), "JPEG")


@pytest.mark.parametrize(
    ("source", "reason", "what"),
    [
        ("missing.png", "no picture", "No such file"),
        ("https://example.com/a.png", "picture elsewhere", "nothing is fetched"),
        ({"url": "x"}, "no picture", "keys url"),
        (7, "no picture", "int"),
        ("data:image/png;base64,@", "broken picture", "base64"),
        (b"not a picture", "broken picture", "cannot identify"),
        (PNG[:-30], "broken picture", "bytes: "),
        (PNG[:400] + bytes([PNG[400] ^ 1]) + PNG[401:], "broken picture", "bytes: "),
        (JPEG[: len(JPEG) // 2], "broken picture", "ends too early"),
        (GIF, "bad picture", "animated"),
        (CMYK, "bad picture", "CMYK"),
        (picture(0, 600, 2), "bad picture", "200 to 1"),
        (noise(30, 30, "CMYK"), "bad picture", "of mode CMYK"),
        (Image.open(io.BytesIO(saved(noise(30, 30), "BMP")[:900])), "broken picture", "truncated"),
        ("a\0b.png", "no picture", "null byte"),
        ("a\ud800.png", "no picture", "surrogates"),
        ("http://[x", "no picture", "Invalid IPv6"),
    ],
)
def test_what_cannot_be_used_says_why(source, reason, what, tmp_path):
    with pytest.raises(RowError, match=what) as error:
        PictureReader(LAYOUT).read(source, str(tmp_path / "rows.jsonl"))
    assert error.value.reason == reason


def test_too_many_pixels_are_refused_from_the_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RowError, match="too large"):
        inspect(PNG)


def test_headers_are_read_without_decoding(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert inspect(PNG) == (24, 40)
    assert inspect(JPEG) == (60, 60)


def test_a_picture_on_its_side_is_seen_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        data = saved(noise(48, 16), kind, exif=exif)
        assert inspect(data) == (48, 16)
        assert open_picture(data).size == (16, 48)
        _, kept = encoded(Image.open(io.BytesIO(data)), "rows")
        assert inspect(kept) == (48, 16) and open_picture(kept).size == (16, 48)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "P with a hole"])
def test_colours_are_those_that_the_processor_of_transformers_sees(mode):
    image = noise(48, 32, "RGBA")
    image.putalpha(image.getchannel("R"))
    options = {"transparency": 3} if " " in mode else {}
    data = saved(image.convert(mode.partition(" ")[0]), "PNG", **options)
    shown = convert_to_rgb(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(open_picture(data)), np.asarray(shown))


def test_embedded_pictures_need_a_folder(tmp_path):
    reader = PictureReader(LAYOUT)
    found = reader.read(PNG, "rows")
    with pytest.raises(DataError, match="--image-cache"):
        reader.close_chunk([[found]])
    if os.geteuid():
        os.chmod(tmp_path, 0o500)
        reader = PictureReader(LAYOUT, tmp_path / "cache")
        with pytest.raises(DataError, match="cannot be written"):
            reader.close_chunk([[reader.read(PNG, "rows")]])


def test_thumbnails_are_small_and_say_what_is_wrong():
    page = thumbnail(picture(0, 900, 700), "rows.jsonl")
    assert page.startswith("<img") and "900 x 700" in page and len(page) < 60_000
    assert "&lt;" in thumbnail("<script>.png", "rows.jsonl")
