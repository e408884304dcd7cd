"""`dso convert MODEL OUT`: a packed copy that loads at once. It appears under its name only when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def convert(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    precision: o.Precision = None,
    kl_budget: o.KlBudget = None,
    calibration: o.Calibration = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Write a packed copy of a model, with its tokenizer."""
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ValueError(f"{out} is the model itself, which packing would lose; name another directory")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another directory, or replace it with --force")

    from deepseek_optimizer.checkpoint import atomic_directory

    from .model import load, print_json

    loaded, tokenizer = load(model, o.model_fields(precision=precision, kl_budget=kl_budget, calibration=calibration))
    with atomic_directory(out, overwrite=force) as partial:
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    curve = loaded.report().curve
    if as_json:
        print_json({"model": model, "out": str(out), "bytes": size, "curve": list(curve)})
        return
    typer.echo(f"{out}: {size / 1e6:,.0f} MB")
    for point in curve:
        chosen = "  (chosen)" if point["chosen"] else ""
        typer.echo(f"{point['bits']:6.2f} bits {point['bytes'] / 1e6:10,.1f} MB   KL {point['measured_kl']:.2g}{chosen}")
