"""Text recognition (OCR): what reads the pictures of scanned pages, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .document import Box


class RecognizedLine(NamedTuple):
    """A line or a paragraph of a page, and its place on the page; None: unknown."""

    text: str
    box: Box | None = None


class PageReader(Protocol):
    """Reads pictures of pages."""

    def read(self, image: Any) -> Sequence[RecognizedLine]:
        """The text of a page, in reading order.

        Args:
            image: a PIL image in RGB.

        Raises:
            RequestError: the model cannot use the picture.
            BackendError: the model failed.
        """
        ...
