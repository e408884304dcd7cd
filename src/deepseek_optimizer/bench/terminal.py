"""A benchmark report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .sections import Section, sections
from .summary import summary_section

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, report: dict[str, Any]) -> None:
    show_sections(console, [summary_section(report), *sections(report)])


def show_sections(console: Console, report: Iterable[Section]) -> None:
    from rich.table import Table
    from rich.text import Text

    for section in report:
        if section.warning:
            console.print(Text(f"WARNING: {section.warning}", style="bold yellow"))
        table = Table(title=Text(section.title) if section.title else None, title_justify="left")
        table.show_header = any(section.header)
        for i, name in enumerate(section.header):
            table.add_column(name, justify="left" if i == 0 or not any(section.header) else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        if section.note:
            console.print(Text(section.note))
