"""A document: the text of its files, and where lines and pages begin in it.

A position is everywhere a number of characters (Unicode code points) from the beginning of a file's extracted text.
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
    """text[start:end] of a file stands on this page; the first has number 1."""

    start: int
    end: int
    number: int


@dataclass(frozen=True)
class TextFile:
    """The text of one file.

    Attributes:
        name: its path as it was given or found, or the name of an upload.
        text: what was extracted; lines end with "\\n".
        pages: by their order, or empty where the format has none.
        headings: where headings begin, ascending: chapters of a text, definitions of source code.
        warnings: what a reader should know: characters that could not be decoded, pages without text.
    """

    name: str
    text: str
    pages: tuple[Page, ...] = ()
    headings: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def line_of(self, start: int) -> int:
        """The number of the line that a position is in, from 1."""
        return self.text.count("\n", 0, start) + 1

    def page_of(self, start: int) -> int | None:
        """The number of the page that a position is on; None where the format has no pages."""
        at = bisect_right(self.pages, start, key=lambda page: page.start) - 1
        return self.pages[max(at, 0)].number if self.pages else None


def clean(text: str) -> str:
    """With "\\n" at the end of lines, and U+FFFD for halves of surrogate pairs, which are no characters, and for NUL."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NO_CHARACTER.sub("\ufffd", text)


def text_file(name: str, text: str, warnings: tuple[str, ...] = ()) -> TextFile:
    """Of plain text, Markdown or source code, by the ending of the name."""
    text = clean(text)
    return TextFile(name, text, headings=headings_of(name, text), warnings=warnings)


class Problem(NamedTuple):
    """A file that could not be read, and why, as a sentence to follow its name."""

    file: str
    message: str


@dataclass(frozen=True)
class Document:
    """
    Attributes:
        files: in the order in which they were given, those of a directory by name.
        problems: files that were left out.
    """

    files: tuple[TextFile, ...]
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of_texts(cls, texts: str | Mapping[str, str]) -> Document:
        """A document of one text, or of several by their names.

        "\\r\\n" and "\\r" become "\\n". Headings are known of Markdown and source code, by the ending of the name.
        """
        named = {DEFAULT_NAME: texts} if isinstance(texts, str) else texts
        return cls(tuple(text_file(name, text) for name, text in named.items()))

    @property
    def characters(self) -> int:
        """Of all files."""
        return sum(len(file.text) for file in self.files)
