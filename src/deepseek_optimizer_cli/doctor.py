"""`dso doctor [MODEL]`: finds what makes a model fail, run slowly or answer badly, and says how to fix it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warning", "yellow"), "error": ("ERROR", "red")}


@o.takes_model_fields
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)] = None,
    symptom: Annotated[
        str | None,
        typer.Option(
            "--symptom",
            "-s",
            metavar="NAME",
            help="Investigate one symptom: out-of-memory, repetition, cuda-error, slow, garbage or latency-jitter.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, metavar="TOKENS", help="Sequence length to check memory for.")
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, metavar="N", help="Number of concurrent sequences to check memory for.")
    ] = 1,
    *,
    fields: dict[str, Any],
    as_json: o.AsJson = False,
) -> None:
    """Check the machine and the installation, and MODEL if given. The exit code is 1 if something will not work."""
    from deepseek_optimizer.config import DeepSeekConfig
    from deepseek_optimizer.doctor import Case, Machine, examine, examine_symptom

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    DeepSeekConfig(**fields)  # an invalid option is a usage error, not a finding
    machine = Machine.here(for_model=model is not None)
    with Case(machine, model=model, fields=fields, context=context, batch=batch) as case:
        findings = examine(case) if symptom is None else examine_symptom(case, symptom)
    counts = Counter(finding.severity for finding in findings)
    if as_json:
        print_json({"model": model, "symptom": symptom, "errors": counts["error"], "findings": [f.to_dict() for f in findings]})
    else:
        _print(findings, counts)
    if counts["error"]:
        raise typer.Exit(1)


def _print(findings: list[Finding], counts: Counter[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, color = _MARKS[finding.severity]
        lines = [finding.what]
        if finding.cause:
            lines.append(f"because: {finding.cause}")
        if finding.fix:
            lines.append(f"fix: {finding.fix}")
        table.add_row(Text(mark, style=color), finding.check, Text("\n".join(lines)))
    console = Console(highlight=False)
    console.print(table)
    console.print(", ".join(f"{counts[word]} {word}" + "s" * (counts[word] != 1) for word in ("error", "warning")))
