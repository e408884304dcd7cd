"""Pictures of pages (PNG, JPEG and others), read by an OCR model."""

from __future__ import annotations

from typing import Any

from ...errors import DocumentError, RequestError
from ..document import TextFile
from ..recognized import PageLines, PictureProblem
from .builder import TextBuilder
from .page_images import REMEDY, picture_of
from .signatures import name_of


def read(name: str, data: bytes, scanned: PageLines | None = None) -> TextFile:
    """
    Raises:
        DocumentError: pictures are not read, this one cannot be, or it has no text.
        MissingPackageError: Pillow is not installed.
        DeepSeekOptimizerError: the OCR model failed.
    """
    if scanned is None:
        raise DocumentError(name, f"is {name_of(data) or 'a picture'}; {REMEDY}")
    builder = TextBuilder(name)
    try:
        builder.recognized_page(scanned(1, lambda: pictures(name, data, 1)), 1)
    except (PictureProblem, RequestError) as error:
        raise DocumentError(name, str(error)) from None
    return builder.build()


def pictures(name: str, data: bytes, number: int) -> list[Any]:
    """The picture itself; see `readers.pictures_of_page`."""
    return [picture_of(data)]
