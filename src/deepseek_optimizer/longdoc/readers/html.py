"""HTML, using lxml: the visible text, as paragraphs, headings and tables.

lxml (libxml2) rather than Beautiful Soup on Python's html.parser: the latter takes quadratic time on some malformed pages, and
kilobytes per element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...errors import DocumentError, MissingPackageError
from ..document import TextFile, clean
from .builder import TextBuilder
from .encodings import decode

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9._:-]{1,40})", re.I)
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_SPACE = re.compile(r"\s+")
_INVISIBLE = frozenset(
    "audio button canvas datalist embed head iframe input map noscript object script select style svg template textarea "
    "video".split()
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = _HEADINGS.keys() | frozenset(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure footer "
    "form header hgroup hr html legend li main menu nav ol p pre search section summary table tbody td tfoot th thead tr "
    "ul".split()
)
_MAX_HEADING = 400  # characters; a longer one is a heading without a closing tag


def read(name: str, data: bytes) -> TextFile:
    """
    Raises:
        DocumentError: it is empty, not text, or has no visible text.
        MissingPackageError: lxml is not installed.
    """
    try:
        from lxml import etree
    except ImportError:
        raise MissingPackageError("reading HTML", "lxml", "longdoc") from None
    declared = _CHARSET.search(data[:4096])
    text, warnings = decode(name, data, declared[1].decode("ascii") if declared else None)
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = etree.fromstring(clean(text).encode(), parser)
    except etree.ParserError as error:
        raise DocumentError(name, f"is invalid HTML ({error})") from error
    if root is None:
        raise DocumentError(name, "has no text")
    builder = TextBuilder(name)
    builder.warnings += warnings
    if any("depth" in entry.message for entry in parser.error_log):
        builder.warnings.append("elements nested too deeply were left out")
    _Page(builder).add(root)
    return builder.build()


class _Page:
    """Adds the visible text of a page to a text."""

    def __init__(self, builder: TextBuilder) -> None:
        self._builder = builder
        self._words: list[str] = []
        self._level = 0  # of the current heading

    def add(self, root: Any) -> None:
        """Adds the content of an element."""
        title = root.find("head/title")
        if title is not None and root.find(".//h1") is None:
            self._builder.heading(title.text or "", 1)
        for what, node in _visible(root):
            if what == "text":
                self._words.append(node)
            elif what == "whole":
                self._end()
                self._whole(node)
            elif node.tag == "br":
                self._words.append("\n" if what == "open" else "")
            elif node.tag in _BLOCKS:
                self._end()
                self._level = _HEADINGS.get(node.tag, self._level) if what == "open" else 0
        self._end()

    def _end(self) -> None:
        lines = (" ".join(line.split()) for line in "".join(self._words).split("\n"))
        text = "\n".join(lines).strip("\n")
        self._words.clear()
        if self._level and len(text) <= _MAX_HEADING:
            self._builder.heading(text, self._level)
        else:
            self._builder.paragraph(text)

    def _whole(self, node: Any) -> None:
        if node.tag == "pre":
            self._builder.paragraph("".join(node.itertext()))
            return
        for caption in node.iter("caption"):
            self._builder.paragraph(_line(caption))
        self._builder.table([[_line(cell) for cell in row if cell.tag in ("td", "th")] for row in node.iter("tr")])


def _visible(root: Any) -> Iterator[tuple[str, Any]]:
    """Yields ("text", string), ("open" or "close", element), and ("whole", element) for elements that are processed as a
    unit."""
    from lxml import etree

    walk = etree.iterwalk(root, events=("start", "end"))
    for event, node in walk:
        if event == "end":
            if not _is_hidden(node):
                yield "close", node
            if node.tail and node is not root:
                yield "text", _SPACE.sub(" ", node.tail)
        elif _is_hidden(node):
            walk.skip_subtree()
        elif node is not root and (node.tag == "pre" or (node.tag == "table" and node.find(".//table") is None)):
            walk.skip_subtree()
            yield "whole", node
        else:
            yield "open", node
            if node.text:
                yield "text", _SPACE.sub(" ", node.text)


def _line(root: Any) -> str:
    """The visible text of an element, on one line."""
    return " ".join("".join(f" {node} " if what == "text" else "" for what, node in _visible(root)).split())


def _is_hidden(node: Any) -> bool:
    return node.tag in _INVISIBLE or node.get("hidden") is not None or bool(_HIDDEN.search(node.get("style", "")))
