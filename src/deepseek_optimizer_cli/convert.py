"""`dso convert MODEL OUT`: a packed copy that loads at once. It appears under its name only when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    """Write a packed copy of a model, with its tokenizer.

    It is written as it is read, layer by layer, so that a model larger than memory converts too; --calibration needs memory for
    the original, and --kl-budget for the original and the copy. After an interruption the same command goes on where it was.
    """
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ValueError(f"{out} is the model itself, which packing would lose; name another directory")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another directory, or replace it with --force")

    from deepseek_optimizer.checkpoint.atomic import sweep

    from .model import print_json

    for path in sweep(out):
        _tell(f"{path} is of another run that is writing now, or of an interrupted one on a file system without locks")
    fields = o.given(precision=precision, kl_budget=kl_budget, calibration=calibration)
    curve = _stream(model, out, fields, force) if kl_budget is None else _in_memory(model, out, fields, force)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if as_json:
        print_json({"model": model, "out": str(out), "bytes": size, "curve": curve})
        return
    typer.echo(f"{out}: {size / 1e6:,.0f} MB")
    for point in curve:
        chosen = "  (chosen)" if point["chosen"] else ""
        typer.echo(f"{point['bits']:6.2f} bits {point['bytes'] / 1e6:10,.1f} MB   KL {point['measured_kl']:.2g}{chosen}")


def _stream(model: str, out: Path, fields: dict[str, Any], force: bool) -> list[dict[str, Any]]:
    """From file to file."""
    from deepseek_optimizer import load_tokenizer
    from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint

    from .model import no_bars_in_pipes

    no_bars_in_pipes()
    pack_checkpoint(model, out, fields, tokenizer=load_tokenizer(model), overwrite=force, tell=_tell)
    return []


def _in_memory(model: str, out: Path, fields: dict[str, Any], force: bool) -> list[dict[str, Any]]:
    """The points of the curve that choosing the formats has measured."""
    from deepseek_optimizer.checkpoint import atomic_directory

    from .model import load

    loaded, tokenizer = load(model, fields)
    with atomic_directory(out, overwrite=force) as partial:
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return list(loaded.report().curve)


def _tell(line: str) -> None:
    typer.echo(f"dso: {line}", err=True)
