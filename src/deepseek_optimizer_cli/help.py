"""The layout of `--help`: plain text, one section per group of options, and no name of an option ever shortened.

Typer's layout with Rich is a table whose first columns are cut with an ellipsis in narrow terminals. Click's layout, used here,
starts the help text on the next line if a name is too long for its column.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

MAX_WIDTH = 100  # columns; text that is wider is hard to read


class Command(TyperCommand):
    """Writes options under the heading of their `rich_help_panel`, in the order in which the panels first appear."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # hidden
                continue
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
