"""Pictures of chats: what is decoded how, and one clear line for each kind that is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from deepseek_optimizer.chat.picture_job import decode
from deepseek_optimizer.chat.pictures import MAX_BYTES, PictureReader, data_of, load_processor, picture_of_file
from deepseek_optimizer.errors import MissingPackageError, RequestError

LIMIT = 1 << 25
RED = Image.new("RGB", (40, 20), (200, 10, 10))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_size(width, height):
    """A PNG whose header claims another size."""
    data = bytearray(encoded(RED))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RED, "JPEG", exif=exif)


def deep():
    return encoded(Image.frombytes("I;16", (8, 4), struct.pack("<32H", *range(0, 64000, 2000))))


@pytest.mark.parametrize(
    ("data", "size", "first"),
    [
        (encoded(RED), (40, 20), (200, 10, 10)),
        (encoded(RED, "JPEG"), (40, 20), (200, 10, 10)),
        (encoded(RED, "WEBP"), (40, 20), (200, 10, 10)),
        (encoded(RED, "GIF"), (40, 20), (200, 10, 10)),
        (encoded(RED, "BMP"), (40, 20), (200, 10, 10)),
        (encoded(RED, "TIFF"), (40, 20), (200, 10, 10)),
        (encoded(RED.convert("CMYK"), "JPEG"), (40, 20), (200, 10, 10)),
        (rotated(), (20, 40), (200, 10, 10)),
        (deep(), (8, 4), (0, 0, 0)),
        (encoded(Image.new("I", (4, 4), 70000), "TIFF"), (4, 4), (255, 255, 255)),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), (4, 4), (127, 127, 127)),
        (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (8, 8), (255, 255, 255)),
        (encoded(Image.new("LA", (8, 8), (0, 128))), (8, 8), (127, 127, 127)),
        (encoded(Image.new("1", (8, 8), 1)), (8, 8), (255, 255, 255)),
        (encoded(RED.convert("P"), transparency=0), (40, 20), (204, 0, 0)),
    ],
)
def test_what_is_decoded(data, size, first):
    width, height, pixels = decode(data, LIMIT)
    assert (width, height) == size and len(pixels) == 3 * width * height
    assert max(abs(a - b) for a, b in zip(pixels[:3], first, strict=True)) <= 3


def test_sixteen_bits_keep_their_range():
    _, _, pixels = decode(deep(), LIMIT)
    assert list(pixels[::3]) == sorted(pixels[::3]) and pixels[-1] == 62000 * 255 // 65535


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a picture in a supported format"),
        (b"hello", "is not a picture in a supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not a picture in a supported format"),
        (encoded(RED.resize((16, 16)), "ICO"), "is not a picture in a supported format"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing; convert it to PNG"),
        (b"\xef\xbb\xbf <SVG/>", "is an SVG drawing; convert it to PNG"),
        (encoded(RED, "JPEG")[:300], "is damaged"),
        (encoded(RED)[:60], "is damaged"),
        (encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20))]), "is animated or has several pages"),
        (encoded(Image.new("1", (100_000, 1))), "one side is more than 200 times the other"),
        (encoded(Image.new("1", (8_000, 8_000))), "has 8,000 x 8,000 pixels, more than 33,554,432"),
        (with_size(60_000, 60_000), "pixels"),
        (with_size(0, 20), "."),
    ],
)
def test_what_is_refused(data, message):
    with pytest.raises(ValueError, match=message) as error:
        decode(data, LIMIT)
    assert "\n" not in str(error.value)


def test_data_urls():
    data = encoded(RED)
    assert data_of("data:image/png;base64," + base64.b64encode(data).decode(), "f") == data
    for url, message in (
        ("http://127.0.0.1/x.png", "must be a data: URL in base64"),
        ("file:///etc/passwd", "must be a data: URL in base64"),
        ("data:image/png,abc", "must be a data: URL in base64"),
        ("data:image/png;base64,%%%", "is not valid base64"),
        ("data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 8), "is larger than 20 MiB"),
    ):
        with pytest.raises(RequestError, match=message):
            data_of(url, "f")


def test_files(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RED))
    assert picture_of_file(tmp_path / "a.png").size == (40, 20)
    (tmp_path / "b.png").write_bytes(b"x")
    for name, message in (("b.png", "is not a picture"), ("missing.png", "cannot be read")):
        with pytest.raises(RequestError, match=message):
            picture_of_file(tmp_path / name)


def test_missing_packages(monkeypatch):
    """Processors of some families need torchvision, which is named."""
    import transformers

    def refuse(*_, **__):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr("deepseek_optimizer.integration.load.resolve.resolve", lambda path: path)
    with pytest.raises(MissingPackageError, match=r"needs torchvision, .*deepseek-optimizer\[vision\]"):
        load_processor("x")


def test_pixels_of_a_request(monkeypatch):
    """Pictures of a request are in memory together."""
    monkeypatch.setattr("deepseek_optimizer.chat.pictures.MAX_TOTAL_PIXELS", 2 * 40 * 20)
    reader = PictureReader(1)
    try:
        assert len(reader.read([("first", encoded(RED))] * 2)) == 2
        with pytest.raises(RequestError, match="third: exceeds 1,600 pixels together with those before it"):
            reader.read([(field, encoded(RED)) for field in ("first", "second", "third")])
    finally:
        reader.close()


def test_worker_processes():
    reader = PictureReader(1, max_pixels=1000)
    try:
        (image,) = reader.read([("first", encoded(RED))])
        assert image.mode == "RGB" and image.size == (40, 20) and image.getpixel((3, 3)) == (200, 10, 10)
        with pytest.raises(RequestError, match="second: has 40 x 40 pixels"):
            reader.read([("second", encoded(RED.resize((40, 40))))])
    finally:
        reader.close()
