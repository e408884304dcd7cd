"""Plain text, logs, Markdown, source code, and whatever else is text: kept as it is."""

from __future__ import annotations

from ..document import TextFile, text_file
from .encodings import decode


def read(name: str, data: bytes) -> TextFile:
    """
    Raises:
        DocumentError: it is empty or no text.
        MissingPackageError: charset-normalizer is needed and not installed.
    """
    return text_file(name, *decode(name, data))
