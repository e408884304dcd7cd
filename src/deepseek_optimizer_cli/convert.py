"""`dso convert MODEL OUT`: writes a packed copy that loads without conversion. OUT appears only once it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o

_Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Sample text, similar to what the model will process; used to round 3- and 4-bit weights and to choose formats. "
        "none: no calibration. Default: a built-in text, if that takes less than a minute.",
        rich_help_panel="Model",
    ),
]
_Vision = Annotated[
    str | None,
    typer.Option(
        "--vision",
        metavar="auto|off",
        help="auto: of a model that reads pictures, convert the whole; its vision tower keeps its precision. off: convert the "
        "language model of Qwen3.5 or Gemma 4 only. Default: auto, but off with --kl-budget or --calibration.",
        rich_help_panel="Model",
    ),
]


def convert(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    precision: o.Precision = None,
    kl_budget: o.KlBudget = None,
    calibration: _Calibration = None,
    vision: _Vision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Write a packed copy of a model, with its tokenizer.

    The model is converted layer by layer, so it may be larger than memory. --calibration needs memory for the original,
    --kl-budget for the original and the copy, and a model that reads pictures or is on the general path for the copy. After an
    interruption, run the same command again to resume.
    """
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ValueError(f"{out} is the model itself, which packing would overwrite; choose another directory")
    if out.exists() and not force:
        raise ValueError(f"{out} already exists; choose another directory, or pass --force to replace it")

    from deepseek_optimizer.checkpoint.atomic import sweep

    from .model import print_json

    for path in sweep(out):
        _note(
            f"{path} belongs to another run that is still in progress, or to an interrupted one on a file system without locks"
        )
    fields = o.not_none(precision=precision, kl_budget=kl_budget, calibration=calibration, vision=vision)
    streams = kl_budget is None and not _takes_general_path(model, fields)
    if streams:
        fields.setdefault("calibration", "auto")
    curve = (_stream if streams else _in_memory)(model, out, fields, force)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if as_json:
        print_json({"model": model, "out": str(out), "bytes": size, "curve": curve})
        return
    typer.echo(f"{out}: {size / 1e6:,.0f} MB")
    for point in curve:
        chosen = "  (chosen)" if point["chosen"] else ""
        typer.echo(f"{point['bits']:6.2f} bits {point['bytes'] / 1e6:10,.1f} MB   KL {point['measured_kl']:.2g}{chosen}")


def _takes_general_path(model: str, fields: dict[str, Any]) -> bool:
    """Whether what is loaded has no execution plan as a whole, as models that read pictures."""
    from deepseek_optimizer.integration.load.loader import open_to_load

    with open_to_load(model, None, fields) as (_, no_plan):
        return no_plan is not None


def _stream(model: str, out: Path, fields: dict[str, Any], force: bool) -> list[dict[str, Any]]:
    """Converts file by file."""
    from deepseek_optimizer import load_tokenizer
    from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint

    from .model import no_bars_in_pipes

    no_bars_in_pipes()
    pack_checkpoint(model, out, fields, tokenizer=load_tokenizer(model), overwrite=force, tell=_note)
    return []


def _in_memory(model: str, out: Path, fields: dict[str, Any], force: bool) -> list[dict[str, Any]]:
    """Converts in memory. Returns the curve of size against quality that was measured while choosing formats."""
    from deepseek_optimizer.checkpoint import atomic_directory
    from deepseek_optimizer.checkpoint.processor_files import copy_processor_files
    from deepseek_optimizer.checkpoint.sentence_transformers import copy_embedding_files
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.integration.multimodal import is_multimodal

    from .model import load

    loaded, tokenizer = load(model, fields)
    with atomic_directory(out, overwrite=force) as partial:
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        copy_embedding_files(resolve(model), partial)
        if is_multimodal(loaded):
            copy_processor_files(resolve(model), partial)
    return list(loaded.dso.manifest.curve)


def _note(line: str) -> None:
    typer.echo(f"dso: {line}", err=True)
