"""Word documents (.docx), using python-docx: paragraphs, headings and tables in order, and notes at the end.

python-docx opens the package and reads its styles. The text is taken from the XML directly, since python-docx's paragraphs omit
tracked insertions, content controls and text boxes, and its cells trust the column count that a merged cell declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any
from zipfile import BadZipFile, ZipFile

from ...errors import DocumentError, MissingPackageError
from ..document import TextFile
from .builder import TextBuilder

MAX_XML, MAX_UNPACKED, MAX_MEMBERS = 48 << 20, 512 << 20, 20_000  # bytes of one XML part, bytes of all parts, number of parts

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_CHARACTERS = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-"}
# Deleted or moved text, formatting, and the alternative content for older readers.
_SKIPPED = {
    f"{_W}del",
    f"{_W}moveFrom",
    f"{_W}pPr",
    f"{_W}rPr",
    "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
}


def read(name: str, data: bytes) -> TextFile:
    """
    Raises:
        DocumentError: it is damaged, too large when unpacked, or has no text.
        MissingPackageError: python-docx is not installed.
    """
    try:
        from docx import Document
    except ImportError:
        raise MissingPackageError("reading .docx", "python-docx", "longdoc") from None
    try:
        _check(name, data)
        word = Document(BytesIO(data))
        builder = TextBuilder(name)
        _Body(builder, _heading_levels(word)).add(word.element.body)
        for notes in _notes(word):
            _Body(builder, {}).add(notes)
        return builder.build()
    except DocumentError:
        raise
    except BadZipFile as error:
        raise DocumentError(name, f"is a damaged .docx ({error})") from error
    except Exception as error:  # a broken file can make python-docx and lxml raise anything
        raise DocumentError(name, f"is a damaged .docx ({type(error).__name__}: {str(error)[:200]})") from error


def _check(name: str, data: bytes) -> None:
    """Checks the archive before anything is unpacked. (A false size is harmless: zipfile reads no more than declared.)"""
    if not data:
        raise DocumentError(name, "is empty")
    with ZipFile(BytesIO(data)) as archive:
        members = archive.infolist()
    if not any(member.filename == "word/document.xml" for member in members):
        raise DocumentError(name, "is not a Word document: it has no word/document.xml")
    if any(member.flag_bits & 1 for member in members):
        raise DocumentError(name, "is encrypted and needs a password; save a copy without one")
    xml = max((m.file_size for m in members if m.filename.endswith((".xml", ".rels"))), default=0)
    unpacked = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or xml > MAX_XML or unpacked > MAX_UNPACKED:
        raise DocumentError(
            name,
            f"unpacks to {unpacked >> 20:,} MB in {len(members):,} parts, more than the limit "
            f"({MAX_UNPACKED >> 20} MB in total, {MAX_XML >> 20} MB of text); split it or save it as text",
        )


def _heading_levels(word: Any) -> dict[str, int]:
    """Style id -> level of "Title" and "Heading 1" to "Heading 9"; the ids depend on the language of Word."""
    levels = {}
    for style in word.styles:
        name = (style.name or "").lower()
        if name == "title":
            levels[style.style_id] = 1
        elif name.startswith("heading ") and name[8:].isdigit():
            levels[style.style_id] = int(name[8:])
    return levels


def _notes(word: Any) -> Iterator[Any]:
    """The root elements of footnotes and endnotes."""
    from docx.oxml import parse_xml

    for relation in word.part.rels.values():
        if not relation.is_external and relation.reltype.endswith(("/footnotes", "/endnotes")):
            yield parse_xml(relation.target_part.blob)


class _Body:
    """Adds the content of an element to a text.

    Args:
        levels: of headings, by style id.
    """

    def __init__(self, builder: TextBuilder, levels: dict[str, int]) -> None:
        self._builder, self._levels = builder, levels

    def add(self, element: Any) -> None:
        """Adds paragraphs and tables, including those in content controls and similar elements."""
        for child in element:
            if child.tag == f"{_W}p":
                self._paragraph(child)
            elif child.tag == f"{_W}tbl":
                rows = _nearest(child, f"{_W}tr")
                self._builder.table([[_text(cell) for cell in _nearest(row, f"{_W}tc")] for row in rows])
            elif child.tag not in _SKIPPED:
                self.add(child)

    def _paragraph(self, paragraph: Any) -> None:
        style = paragraph.find(f"{_W}pPr/{_W}pStyle")
        level = self._levels.get(style.get(f"{_W}val")) if style is not None else None
        text = _text(paragraph)
        if level is None:
            self._builder.paragraph(text)
        else:
            self._builder.heading(text, level)


def _nearest(element: Any, tag: str) -> Iterator[Any]:
    """Descendants with this tag, but none inside another one: a table in a cell is text of that cell."""
    for child in element:
        if child.tag == tag:
            yield child
        elif child.tag not in _SKIPPED:
            yield from _nearest(child, tag)


def _text(element: Any) -> str:
    """The text of runs at any depth; nested paragraphs (in text boxes, cells) are on separate lines."""
    parts: list[str] = []
    _collect(element, parts)
    return "".join(parts).strip("\n")


def _collect(element: Any, parts: list[str]) -> None:
    for child in element:
        tag = child.tag
        if tag == f"{_W}t":
            parts.append(child.text or "")
        elif tag in _CHARACTERS:
            parts.append(_CHARACTERS[tag])
        elif tag not in _SKIPPED:
            _collect(child, parts)
            if tag == f"{_W}p":
                parts.append("\n")
