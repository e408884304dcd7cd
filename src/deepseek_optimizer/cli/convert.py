"""`dso convert MODEL OUT`: a packed copy that loads at once. It appears under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
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
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is no directory")

    from .model import load, print_json

    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        loaded, tokenizer = load(model, o.model_fields(precision=precision))
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _flush(partial)
        _put_in_place(partial, out.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if as_json:
        print_json({"model": model, "out": str(out), "precision": precision, "bytes": size})
    else:
        typer.echo(f"{out}: {size / 1e6:,.0f} MB")


def _flush(folder: Path) -> None:
    """On disk before the name says that it is there: files first, then the directories that list them."""
    for path in sorted(folder.rglob("*"), reverse=True) + [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`. What was there before is set aside first, so that no moment shows a mixture."""
    aside = partial.with_suffix(".replaced")
    if out.exists():
        out.rename(aside)
    try:
        partial.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
