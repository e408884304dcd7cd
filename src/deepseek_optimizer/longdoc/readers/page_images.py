"""The pictures of scanned pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...chat import picture_job
from ...chat.pictures import rgb_image
from ...errors import MissingPackageError
from ..recognized import PictureProblem

REMEDY = "dso longdoc and dso serve read them with an OCR model (--ocr MODEL)"
MAX_PIXELS = 1 << 26  # of a page: A4 at 600 dpi has half of that
MAX_PICTURES = 64  # of a page
_MIN_SHARE = 0.1  # smaller pictures, by pixels of the largest one of the page, are logos or stamps


def picture_of(data: bytes) -> Any:
    """A picture in RGB.

    Raises:
        PictureProblem: it is damaged, or too large or narrow, or not a picture.
        MissingPackageError: Pillow is not installed.
    """
    try:
        width, height, pixels = picture_job.decode(data, MAX_PIXELS)
    except ImportError as error:
        raise MissingPackageError("a scanned page", "Pillow", "vision") from error
    except ValueError as error:
        raise PictureProblem(str(error)) from None
    return rgb_image(width, height, pixels)


def pictures_of_page(page: Any) -> list[Any]:
    """The pictures of a page of pypdf, in the order in which it shows them, upright. Pictures of the same width, in which
    scanners divide a page, become one.

    Raises:
        PictureProblem: one cannot be read.
        MissingPackageError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401  pypdf needs it
    except ImportError as error:
        raise MissingPackageError("a scanned page", "Pillow", "vision") from error
    names = list(page.images.keys())
    if len(names) > MAX_PICTURES:
        raise PictureProblem(f"has {len(names):,} pictures, more than {MAX_PICTURES}")
    _check_total(sum(_pixels(page.get("/Resources"))))  # before pypdf decodes them
    images, pixels = [], 0
    for name in names:
        image = page.images[name].image
        if image is None:
            raise PictureProblem("has a picture in a format that cannot be decoded")
        pixels += image.width * image.height  # of pictures within the contents as well, and as the data says
        _check_total(pixels)
        images.append(rgb_image(*picture_job.rgb(image)))  # as the PDF says
    largest = max((image.width * image.height for image in images), default=0)
    images = [image for image in images if image.width * image.height >= _MIN_SHARE * largest]
    turned = int(page.get("/Rotate", 0) or 0) % 360
    if len(images) > 1 and len({image.width for image in images}) == 1:
        images = [_stacked(images)]
    for image in images:
        try:
            picture_job.check(image.width, image.height, MAX_PIXELS)
        except ValueError as error:
            raise PictureProblem(str(error)) from None
    return [image.rotate(-turned, expand=True) if turned else image for image in images]


def _check_total(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise PictureProblem(f"has pictures of {pixels:,} pixels, more than {MAX_PIXELS:,}")


def _pixels(resources: Any) -> Iterator[int]:
    """Pixels of the embedded pictures of a page by their names, also of those in forms: pypdf decodes a picture once for each
    of its names, and enters each form once."""
    forms: dict[int, Any] = {}  # by identity; kept, so that no other object gets it
    waiting = [resources]
    while waiting:
        resources = waiting.pop()
        objects = None if resources is None else resources.get_object().get("/XObject")
        for entry in () if objects is None else objects.get_object().values():
            item = entry.get_object()
            if item.get("/Subtype") == "/Form" and id(item) not in forms:
                forms[id(item)] = item
                waiting.append(item.get("/Resources"))
            elif item.get("/Subtype") == "/Image":
                yield int(item.get("/Width", 0)) * int(item.get("/Height", 0))


def _stacked(images: list[Any]) -> Any:
    from PIL import Image

    height = sum(image.height for image in images)
    whole, at = Image.new("RGB", (images[0].width, height)), 0
    for image in images:
        whole.paste(image, (0, at))
        at += image.height
    return whole
