"""`dso info [MODEL]`: CPU features, the selected kernels and why; with a model, its formats and memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o


@o.takes_model_fields
def info(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)] = None,
    *,
    fields: dict[str, Any],
    as_json: o.AsJson = False,
) -> None:
    """Show the CPU, the selected kernels and the reason for the choice; with MODEL, also its formats and memory."""
    from .model import load, print_json

    facts = machine_facts()
    report = None
    if model is not None:
        from deepseek_optimizer import report as report_of

        loaded, _ = load(model, fields)
        report = report_of(loaded)
    if as_json:
        print_json(facts if report is None else {**facts, "model": report.to_dict()})
        return
    _print_machine(facts)
    if report is not None:
        typer.echo(str(report))


def machine_facts() -> dict[str, Any]:
    """Versions, CPU, each instruction set with whether it is supported here, the selected one and why, and thread count."""
    from deepseek_optimizer.backends.cpu import native, unavailable_reason
    from deepseek_optimizer.versions import versions

    facts: dict[str, Any] = dict(versions())
    reason = unavailable_reason()
    if reason is not None:
        return {**facts, "backend": "reference", "reason": reason}
    from deepseek_optimizer.backends.cpu import CpuBackend
    from deepseek_optimizer.doctor.checks.features import why_not

    backend = CpuBackend()
    return {
        **facts,
        "backend": "cpu",
        "reason": _why(backend.isa),
        "isa": backend.isa,
        "threads": backend.threads,
        "topology": backend.topology,
        "isas": {name: why_not(name) or "runs here" for name in native.isa_names()},
        "cpu": native.cpu_description(),
    }


def _why(isa: str) -> str:
    import os

    if os.environ.get("DSO_ISA"):
        return f"DSO_ISA={os.environ['DSO_ISA']} selects {isa}"
    return f"{isa} is the best instruction set of this build that the CPU and the kernel support"


def _print_machine(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        for i, (part, text) in enumerate(value.items() if isinstance(value, dict) else [("", value)]):
            if isinstance(text, list):
                text = ", ".join(map(str, text))
            elif isinstance(text, dict):
                text = ", ".join(f"{k} {v // 1024} KiB" for k, v in text.items())
            table.add_row(name if i == 0 else "", part, str(text))
    Console(highlight=False).print(table)
