"""`dso models`: the supported families, and the memory that well-known models need."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from . import options as o

_WIDTH = 140  # of the tables if stdout is not a terminal


def models(
    family: Annotated[
        str | None, typer.Argument(metavar="FAMILY", help="Only this model_type, such as qwen3. Default: all.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show the supported model families, and the memory that well-known models need at 8,192 tokens."""
    from deepseek_optimizer.catalog.families import families
    from deepseek_optimizer.catalog.known import MODELS

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    rows = [row for row in families() if family in (None, row.family)]
    if not rows:
        raise ValueError(f"no family {family!r} is listed; `dso models` lists all, and load_model tries any of Transformers")
    known = [_memory(model) for model in MODELS if family in (None, model.family)]
    if as_json:
        print_json({"families": [asdict(row) for row in rows], "models": known})
        return
    _print(rows, known)


def _memory(model: Any) -> dict[str, Any]:
    from deepseek_optimizer.catalog.memory import CONTEXT, FORMATS, need

    needs = need(model)
    return {
        "model": model.name,
        "family": model.family,
        "path": needs.path,
        "parameters": needs.parameters,
        "context": CONTEXT,
        "weights": dict(needs.weights),
        "cache_per_token": needs.cache_per_token,
        "buffers": needs.buffers,
        "total": {name: needs.total(name) for name in FORMATS},
    }


def _print(rows: list[Any], known: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from deepseek_optimizer.catalog.memory import CONTEXT, FORMATS

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(title="Families", title_justify="left")
    for name in ("family", "path", "attention", "drafts", "training"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.family, row.path, *(", ".join(part) for part in (row.attention, row.drafts, row.training)))
    console.print(table)
    console.print(f"Weight formats of all families: {', '.join(rows[0].formats)}.")
    if not known:
        return
    table = Table(title=f"Memory with one sequence of {CONTEXT:,} tokens, computed", title_justify="left")
    for name in ("model", "family", "path", "parameters", *FORMATS):
        table.add_column(name, overflow="fold", justify="right" if name in ("parameters", *FORMATS) else "left")
    for model in known:
        sizes = (f"{model['total'][name] / 1e9:,.1f} GB" for name in FORMATS)
        table.add_row(model["model"], model["family"], model["path"], f"{model['parameters'] / 1e9:,.2f} B", *sizes)
    console.print(table)
    console.print("Plan: weights, buffers and a bf16 cache. General: weights only; cache and buffers are Transformers' own.")
