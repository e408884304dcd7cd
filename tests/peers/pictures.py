"""Pictures in the place of those that the suites download: random colors."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any


def picture_of(name: str) -> Any:
    """The PIL image that takes the place of a file."""
    from support.picture_processors import picture

    return picture(48, 32, zlib.crc32(name.encode()))


def bytes_of(image: Any) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def url_of(image: Any) -> str:
    """A data URL: `dso serve` fetches none."""
    return "data:image/png;base64," + base64.b64encode(bytes_of(image)).decode()


def picture_at(url: str) -> Any:
    """The PIL image of a data URL."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
