"""Readers: bytes to text, one format per file.

A reader never accesses the disk, and raises `DocumentError` for content it cannot read. A new format is a module with
`read(name, data)`, and its line in `_BY_SIGNATURE` or `_BY_ENDING`.
"""

from __future__ import annotations

from importlib import import_module
from os.path import splitext
from typing import Any

from ..document import TextFile
from ..recognized import PageLines, PageReader, read_by
from .signatures import looks_like_html, looks_like_pdf, looks_like_picture, looks_like_word

_BY_SIGNATURE = {"pdf": looks_like_pdf, "docx": looks_like_word, "html": looks_like_html, "picture": looks_like_picture}
_BY_ENDING = {".pdf": "pdf", ".docx": "docx", ".docm": "docx", ".html": "html", ".htm": "html", ".xhtml": "html"}


_WITH_PICTURES = ("pdf", "picture")  # formats of scanned pages; their modules have `pictures` too, see `pictures_of_page`


def read(name: str, data: bytes, ocr: PageReader | None = None) -> TextFile:
    """The text of a file's bytes. The format is recognized by the content, or else by the file extension.

    Args:
        name: of the file.
        data: its content.
        ocr: reads pictures of pages; None: they are not read.

    Raises:
        DocumentError: it cannot be read.
        DeepSeekOptimizerError: the OCR model failed.
        MissingPackageError: its format needs a library that is not installed.
    """
    return read_with(name, data, None if ocr is None else read_by(ocr))


def read_with(name: str, data: bytes, scanned: PageLines | None) -> TextFile:
    """As `read`, with the lines of scanned pages from `scanned`."""
    format = _format(name, data)
    reader = import_module(f".{format}", __name__)
    file: TextFile = reader.read(name, data, scanned) if format in _WITH_PICTURES else reader.read(name, data)
    return file


def pictures_of_page(name: str, data: bytes, number: int) -> list[Any]:
    """The pictures of a scanned page, for which `read_with` calls its `scanned`: PIL images in RGB.

    Args:
        number: of the page, from 1.

    Raises:
        PictureProblem: they cannot be read.
        DocumentError, MissingPackageError: as for `read`.
    """
    pictures: list[Any] = import_module(f".{_format(name, data)}", __name__).pictures(name, data, number)
    return pictures


def _format(name: str, data: bytes) -> str:
    ending = splitext(name)[1].lower()
    for format, fits in _BY_SIGNATURE.items():
        if fits(ending, data):
            return format
    return _BY_ENDING.get(ending, "text")
