"""Builds a text from paragraphs, headings, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DocumentError
from ..document import Page, TextBox, TextFile, clean
from ..recognized import RecognizedLine

MAX_CHARACTERS = 128 << 20  # more than any book; a small file that unpacks to more is malicious


class TextBuilder:
    """Paragraphs are separated by a blank line; a heading starts with one "#" per level.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[str] = []
        self._length = 0
        self._headings: list[int] = []
        self._pages: list[Page] = []
        self._boxes: list[TextBox] = []
        self.warnings: list[str] = []

    def paragraph(self, text: str) -> None:
        """Adds a paragraph; text that is only white space is ignored.

        Raises:
            DocumentError: the text becomes too long.
        """
        text = clean(text).strip("\n")
        if text.strip():
            self._append(text + "\n\n")

    def heading(self, text: str, level: int) -> None:
        """Adds a heading; level 1 is the highest."""
        text = " ".join(text.split())
        if text:
            self._headings.append(self._length)
            self.paragraph(f"{'#' * min(max(level, 1), 6)} {text}")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Adds a table: one line per row, with " | " between cells."""
        lines = [" | ".join(" ".join(cell.split()) for cell in row) for row in rows]
        self.paragraph("\n".join(line for line in lines if line.strip(" |")))

    def page(self, text: str, number: int) -> None:
        """Adds a page, which may be empty."""
        start = self._length
        self.paragraph(text)
        self._pages.append(Page(start, self._length, number))

    def recognized_page(self, lines: Sequence[RecognizedLine], number: int) -> None:
        """Adds a page that a `PageReader` has read."""
        start, at, texts = self._length, self._length, []
        for line in lines:
            if text := clean(line.text).strip():
                texts.append(text)
                if line.box is not None:
                    self._boxes.append(TextBox(at, at + len(text), line.box))
                at += len(text) + 1
        self.paragraph("\n".join(texts))
        self._pages.append(Page(start, self._length, number))

    def build(self) -> TextFile:
        """
        Raises:
            DocumentError: there is no text.
        """
        text = "".join(self._parts)
        if not text:
            raise DocumentError(self._name, "has no text")
        return TextFile(self._name, text, tuple(self._pages), tuple(self._headings), tuple(self.warnings), tuple(self._boxes))

    def _append(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
        if self._length > MAX_CHARACTERS:
            raise DocumentError(self._name, f"has more than {MAX_CHARACTERS:,} characters of text; split the file")
