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
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Write a packed copy of a model, with its tokenizer."""
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another directory, or replace it with --force")

    from deepseek_optimizer.checkpoint import atomic_directory

    from .model import load, print_json

    loaded, tokenizer = load(model, o.model_fields(precision=precision))
    with atomic_directory(out, overwrite=force) as partial:
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if as_json:
        print_json({"model": model, "out": str(out), "bytes": size})
    else:
        typer.echo(f"{out}: {size / 1e6:,.0f} MB")
