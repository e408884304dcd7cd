"""Decodes pictures, in this process or in a worker (see `system.sandbox.worker`): a decoder of images is a large target."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from typing import Any

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_RATIO = 200  # of the longer to the shorter side; the processors of several models refuse more
_BACKGROUND = (255, 255, 255)  # behind transparent pixels


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """See `system.sandbox.worker.Worker`.

    Args:
        setup: {"max_pixels": maximum number of pixels of a picture}.
    """
    import PIL.ImageOps

    PIL.Image.init()  # loads the decoders, before memory is limited

    def run(payload: dict[str, Any]) -> Any:
        width, height, pixels = decode(base64.b64decode(payload["data"]), setup["max_pixels"])
        return {"size": [width, height], "pixels": base64.b64encode(pixels).decode()}

    return run


def decode(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a picture, upright as its EXIF data says, transparent pixels over white.

    Args:
        data: the content of a file.
        max_pixels: maximum number of pixels.

    Raises:
        ValueError: it is not a picture in one of FORMATS, is damaged, animated, too large or too narrow.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if _is_svg(data):
        raise ValueError("is an SVG drawing; convert it to PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit of pixels, which is lower than `max_pixels` may be
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check(*image.size, max_pixels)
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"is animated or has several pages ({frames}); send one of them")
            image.load()
            return rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"is not a picture in a supported format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"has too many pixels: {error}; scale it down") from None
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many types for damaged files
        raise ValueError(f"is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _is_svg(data: bytes) -> bool:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!doctype")) and b"<svg" in data[:4096].lower())


def check(width: int, height: int, max_pixels: int) -> None:
    """Checks the size of a picture. ValueError: it has too many pixels, none, or is too narrow."""
    if width < 1 or height < 1:
        raise ValueError("has no pixels")
    if width * height > max_pixels:
        raise ValueError(f"has {width:,} x {height:,} pixels, more than {max_pixels:,} in total; scale it down")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"has {width:,} x {height:,} pixels: one side is more than {MAX_RATIO} times the other; crop it")


def rgb(image: Any) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a PIL image, see `decode`."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 bits per pixel, or more
        low, high = image.getextrema()
        scale = 255 / 65535 if image.mode.startswith("I") and high > 255 else 255 / max(high, 1.0) if high <= 1 else 1.0
        image = image.point(lambda value: value * scale) if low >= 0 else image
        image = image.convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*_BACKGROUND, 255)), image)
    image = image.convert("RGB")
    return image.width, image.height, image.tobytes()
