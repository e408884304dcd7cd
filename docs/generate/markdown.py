"""Markdown from docstrings: Google-style sections as tables, and text that is safe in a table cell."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_SECTION = re.compile(r"(Attributes|Args|Returns|Raises):\s*(.*)$")
_ENTRY = re.compile(r"([A-Za-z_*][\w*]*(?:, [A-Za-z_*][\w*]*)*): (.*)$")
_CODE = re.compile(r"(`+[^`]+`+)")


@dataclass
class Docstring:
    """`text`: everything outside sections. `entries`: of Attributes and Args, (names, text). `raises`: likewise.
    `returns`: the text of Returns."""

    text: str = ""
    entries: list[tuple[str, str]] = field(default_factory=list)
    raises: list[tuple[str, str]] = field(default_factory=list)
    returns: str = ""

    def of(self, name: str) -> str:
        """The description of one attribute or argument; "" if it has none."""
        return next((text for names, text in self.entries if name in names.split(", ")), "")


def parse(docstring: str | None) -> Docstring:
    """Splits a Google-style docstring into its sections."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(docstring or "").splitlines():
        if found := _SECTION.match(line):
            sections.append((found[1], [found[2]] if found[2] else []))
        elif line and not line.startswith(" ") and sections[-1][0]:  # text after a section
            sections.append(("", [line]))
        else:
            sections[-1][1].append(line)
    result = Docstring()
    texts = []
    for title, lines in sections:
        if not title:
            texts.append("\n".join(lines).strip())
        elif title == "Returns":
            result.returns = " ".join(line.strip() for line in lines if line.strip())
        else:
            entries = result.raises if title == "Raises" else result.entries
            entries += _entries(lines)
    result.text = "\n\n".join(text for text in texts if text)
    return result


def _entries(lines: Iterable[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in inspect.cleandoc("\n" + "\n".join(lines)).splitlines():
        entry = _ENTRY.match(line)
        if entry:
            found.append((entry[1], entry[2]))
        elif found and line.strip():
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif line.strip():
            found.append(("", line.strip()))
    return found


def plain(text: str) -> str:
    """Text in which nothing but code spans is markup."""
    parts = _CODE.split(text)
    return "".join(part if i % 2 else re.sub(r"([*<_])", r"\\\1", part) for i, part in enumerate(parts))


def cell(text: str) -> str:
    """Text on one line that does not end its table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def raises(docstring: Docstring) -> str:
    """The section on errors as a list; "" if there is none."""
    return "\n".join(
        f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {plain(text)}" if names else f"- {plain(text)}"
        for names, text in docstring.raises
    )
