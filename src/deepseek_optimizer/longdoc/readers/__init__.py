"""Readers: bytes to text, one format per file.

A reader never accesses the disk, and raises `DocumentError` for content it cannot read. A new format is a module with
`read(name, data)`, and its line in `_BY_SIGNATURE` or `_BY_ENDING`.
"""

from __future__ import annotations

from importlib import import_module
from os.path import splitext

from ..document import TextFile
from .signatures import looks_like_html, looks_like_pdf, looks_like_word

_BY_SIGNATURE = {"pdf": looks_like_pdf, "docx": looks_like_word, "html": looks_like_html}
_BY_ENDING = {".pdf": "pdf", ".docx": "docx", ".docm": "docx", ".html": "html", ".htm": "html", ".xhtml": "html"}


def read(name: str, data: bytes) -> TextFile:
    """The text of a file's bytes. The format is recognized by the content, or else by the file extension.

    Raises:
        DocumentError: it cannot be read.
        MissingPackageError: its format needs a library that is not installed.
    """
    file: TextFile = import_module(f".{_format(name, data)}", __name__).read(name, data)
    return file


def _format(name: str, data: bytes) -> str:
    ending = splitext(name)[1].lower()
    for format, fits in _BY_SIGNATURE.items():
        if fits(ending, data):
            return format
    return _BY_ENDING.get(ending, "text")
