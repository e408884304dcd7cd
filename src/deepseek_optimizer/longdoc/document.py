"""A document: the text of its files, with pages and headings.

Positions are character offsets (Unicode code points) in a file's extracted text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .headings import headings_of

DEFAULT_NAME = "text"
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


class Page(NamedTuple):
    """text[start:end] of a file is on this page; the first page has number 1."""

    start: int
    end: int
    number: int


Box = tuple[float, float, float, float]  # left, top, right and bottom on a page, from 0 to 1


class TextBox(NamedTuple):
    """text[start:end] of a file is in this part of its page."""

    start: int
    end: int
    box: Box


@dataclass(frozen=True)
class TextFile:
    """The text of one file.

    Attributes:
        name: its path, or the name of an upload.
        text: the extracted text; lines end with "\\n".
        pages: in order; empty if the format has none.
        headings: start positions of headings, ascending: chapters of a text, definitions in source code.
        warnings: for example, characters that could not be decoded, or pages without text.
        boxes: places of texts on their pages, in order; only of pages that a model has read, see `recognized`.
    """

    name: str
    text: str
    pages: tuple[Page, ...] = ()
    headings: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    boxes: tuple[TextBox, ...] = ()

    def line_of(self, start: int) -> int:
        """The line number of a position, from 1."""
        return self.text.count("\n", 0, start) + 1

    def page_of(self, start: int) -> int | None:
        """The page number of a position; None if the format has no pages."""
        at = bisect_right(self.pages, start, key=lambda page: page.start) - 1
        return self.pages[max(at, 0)].number if self.pages else None

    def box_of(self, start: int, end: int) -> Box | None:
        """The place of text[start:end] on the page of its first character; None: unknown."""
        page = self.page_of(start)
        found = [one.box for one in self.boxes if one.start < end and start < one.end and self.page_of(one.start) == page]
        if not found:
            return None
        left, top, right, bottom = zip(*found, strict=True)
        return min(left), min(top), max(right), max(bottom)


def clean(text: str) -> str:
    """Normalizes line ends to "\\n", and replaces lone surrogates and NUL by U+FFFD."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NO_CHARACTER.sub("\ufffd", text)


def text_file(name: str, text: str, warnings: tuple[str, ...] = ()) -> TextFile:
    """A TextFile of plain text, Markdown or source code, recognized by the file extension."""
    text = clean(text)
    return TextFile(name, text, headings=headings_of(name, text), warnings=warnings)


class Problem(NamedTuple):
    """A file that could not be read, and why: a phrase to follow the file name."""

    file: str
    message: str


@dataclass(frozen=True)
class Document:
    """The text of one or several files.

    Attributes:
        files: the files, in the order given; those of a directory are sorted by name.
        problems: files that were skipped, with the reasons.
    """

    files: tuple[TextFile, ...]
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of_texts(cls, texts: str | Mapping[str, str]) -> Document:
        """A document of one text, or of several by name.

        "\\r\\n" and "\\r" become "\\n". Headings are found in Markdown and source code, by the extension of the name.
        """
        named = {DEFAULT_NAME: texts} if isinstance(texts, str) else texts
        return cls(tuple(text_file(name, text) for name, text in named.items()))

    @property
    def characters(self) -> int:
        """Number of characters in all files."""
        return sum(len(file.text) for file in self.files)
