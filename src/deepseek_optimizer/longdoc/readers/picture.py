"""Pictures of pages (PNG, JPEG and others), read by an OCR model."""

from __future__ import annotations

from ...errors import DocumentError, RequestError
from ..document import TextFile
from ..recognized import PageReader
from .builder import TextBuilder
from .page_images import REMEDY, PictureProblem, picture_of
from .signatures import name_of


def read(name: str, data: bytes, ocr: PageReader | None = None) -> TextFile:
    """
    Raises:
        DocumentError: no OCR model is given, the picture cannot be read, or the model found no text.
        MissingPackageError: Pillow is not installed.
        DeepSeekOptimizerError: the OCR model failed.
    """
    if ocr is None:
        raise DocumentError(name, f"is {name_of(data) or 'a picture'}; {REMEDY}")
    builder = TextBuilder(name)
    try:
        builder.recognized_page(ocr.read(picture_of(data)), 1)
    except (PictureProblem, RequestError) as error:
        raise DocumentError(name, str(error)) from None
    return builder.build()
