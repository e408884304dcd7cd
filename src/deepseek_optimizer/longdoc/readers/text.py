"""Plain text, logs, Markdown, source code and any other text, unchanged."""

from __future__ import annotations

from ..document import TextFile, text_file
from .encodings import decode


def read(name: str, data: bytes) -> TextFile:
    """
    Raises:
        DocumentError: it is empty or not text.
        MissingPackageError: charset-normalizer is needed and not installed.
    """
    return text_file(name, *decode(name, data))
