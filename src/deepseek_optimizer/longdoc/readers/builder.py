"""Puts a text together from paragraphs, headings, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DocumentError
from ..document import Page, TextFile, clean

MAX_CHARACTERS = 128 << 20  # more than any book; a small file that unpacks to more is made to do harm


class TextBuilder:
    """Paragraphs have a blank line between them, and headings begin with as many "#" as their level is deep.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[str] = []
        self._length = 0
        self._headings: list[int] = []
        self._pages: list[Page] = []
        self.warnings: list[str] = []

    def paragraph(self, text: str) -> None:
        """A stretch of text; nothing where it is only white space.

        Raises:
            DocumentError: the text became too long.
        """
        text = clean(text).strip("\n")
        if text.strip():
            self._append(text + "\n\n")

    def heading(self, text: str, level: int) -> None:
        """Level 1 is the highest."""
        text = " ".join(text.split())
        if text:
            self._headings.append(self._length)
            self.paragraph(f"{'#' * min(max(level, 1), 6)} {text}")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """A line a row, with bars between cells."""
        lines = [" | ".join(" ".join(cell.split()) for cell in row) for row in rows]
        self.paragraph("\n".join(line for line in lines if line.strip(" |")))

    def page(self, text: str, number: int) -> None:
        """A page, also an empty one."""
        start = self._length
        self.paragraph(text)
        self._pages.append(Page(start, self._length, number))

    def build(self) -> TextFile:
        """
        Raises:
            DocumentError: there is no text.
        """
        text = "".join(self._parts)
        if not text:
            raise DocumentError(self._name, "has no text")
        return TextFile(self._name, text, tuple(self._pages), tuple(self._headings), tuple(self.warnings))

    def _append(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
        if self._length > MAX_CHARACTERS:
            raise DocumentError(self._name, f"has more than {MAX_CHARACTERS:,} characters of text; read a part of it")
