"""The layout of `--help`: plain text, one section per group of options, and names of options that are never shortened.

Typer's layout with Rich is a table that cuts the first columns with an ellipsis in narrow terminals. Click's layout, used here,
starts the help text on the next line if a name is too long for its column.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

MAX_WIDTH = 100  # columns; wider text is hard to read


def argument_usage(argument: Any) -> str:
    """An argument as in a usage line: MODEL, [MODEL] if it is optional, FILE... if there may be several."""
    name = str(argument.metavar or argument.name.upper()) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


class Command(TyperCommand):
    """Writes options under the heading of their `rich_help_panel`, in the order in which the panels first appear."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line; Typer's own writes {MODEL} for a required argument."""
        arguments = (p for p in self.get_params(ctx) if p.param_type_name == "argument")
        return ["[OPTIONS]", *(argument_usage(argument) for argument in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # hidden
                continue
            default = "Options"
            if parameter.param_type_name == "argument":  # Typer's record also names the Python type
                default, record = "Arguments", (argument_usage(parameter).strip("[]"), getattr(parameter, "help", None) or "")
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
