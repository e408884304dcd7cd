"""`reference/command-line.md`: every command, from the same declarations that `--help` prints."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from deepseek_optimizer_cli.help import argument_usage

from .markdown import plain, table

INTRODUCTION = """\
# Command line

This page is generated from the code by `python -m docs.generate`; `dso COMMAND --help` shows the same. `dso` and
`deepseek-optimizer` are the same program.

Answers go to stdout, everything else to stderr. Exit codes: 0 success; 1 a check or comparison failed (`dso doctor`,
`dso bench --baseline`); 2 an error, reported on one line (`dso --debug COMMAND ...` shows the traceback); 130 interrupted.
"""


def page() -> str:
    group = commands()
    return "\n\n".join([INTRODUCTION.rstrip(), *(section(name, command) for name, command in group.commands.items())])


def commands() -> Any:
    """The group of all commands, as click has it."""
    import typer

    from deepseek_optimizer_cli.app import app

    return typer.main.get_command(app)


def flags(command: Any) -> set[str]:
    """Every spelling of every option of a command."""
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts) if flag[0] == "-"}


def section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    kinds = _kinds(command.callback)
    usage = " ".join(["dso", name, "[OPTIONS]", *(argument_usage(p) for p in arguments)])
    text = [f"## dso {name}", f"```text\n{usage}\n```", plain(" ".join((command.help or "").split()))]
    if arguments:
        text.append(table(("argument", "meaning"), [(f"`{argument_usage(p)}`", plain(p.help or "")) for p in arguments]))
    if options:
        text.append(table(("option", "default", "meaning"), [_row(p, kinds[p.name]) for p in options]))
    return "\n\n".join(text)


def _kinds(callback: Any) -> dict[str, str]:
    """What each parameter takes, as `--help` writes it: TEXT, INTEGER, FLOAT or PATH."""
    names = {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}
    found = {}
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        parts = set(_plain_types(parameter.annotation))
        found[parameter.name] = next((word for kind, word in names.items() if kind in parts), "")
    return found


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: those in Annotated, unions and lists."""
    parts = typing.get_args(annotation)
    if not parts:
        yield annotation
    for part in parts[:1] if typing.get_origin(annotation) is Annotated else parts:
        yield from _plain_types(part)


def _row(parameter: Any, kind: str) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if not parameter.is_flag:
        names += f" `{parameter.metavar or kind}`"
    default = parameter.default
    shown = "" if default in (None, (), []) or default is False else f"`{default}`"
    if parameter.is_flag and default is True:
        shown = f"`{parameter.opts[0]}`"
    return names, shown, plain(parameter.help or "")
