"""Text recognition (OCR): what reads the pictures of scanned pages, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from .document import Box


class RecognizedLine(NamedTuple):
    """A line or a paragraph of a page, and its place on the page; None: unknown."""

    text: str
    box: Box | None = None


class PictureProblem(ValueError):
    """Why a picture of a page cannot be read: a phrase to follow its place."""


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


# The lines of a scanned page, of which it gets the number and a function that decodes its pictures. It raises PictureProblem or
# RequestError if they cannot be read.
PageLines = Callable[[int, Callable[[], Sequence[Any]]], Sequence[RecognizedLine]]


def lines_of_pictures(parts: Sequence[Sequence[RecognizedLine]]) -> list[RecognizedLine]:
    """The lines of a page, given those of each of its pictures. If it has several, none of them is the whole page, so that
    lines have no places."""
    lines = [line for part in parts for line in part if line.text.strip()]
    return lines if len(parts) == 1 else [RecognizedLine(line.text) for line in lines]


def read_by(reader: PageReader) -> PageLines:
    """Pages whose pictures `reader` reads when their lines are needed."""
    return lambda number, pictures: lines_of_pictures([reader.read(picture) for picture in pictures()])
