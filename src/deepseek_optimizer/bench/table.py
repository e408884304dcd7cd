"""A report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .sections import Section, sections

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, report: dict[str, Any]) -> None:
    show_sections(console, sections(report))


def show_sections(console: Console, found: Iterable[Section]) -> None:
    from rich.table import Table
    from rich.text import Text

    for section in found:
        table = Table(title=Text(section.title) if section.title else None, title_justify="left")
        table.show_header = any(section.header)
        for i, name in enumerate(section.header):
            table.add_column(name, justify="left" if i == 0 or not any(section.header) else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        if section.note:
            console.print(Text(section.note))
