"""`dso prune MODEL OUT`: writes a smaller model without the parts that matter least, and trains it to recover."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .train import run_with_bar, with_settings

_WHAT: dict[str, Any] = {"rich_help_panel": "What to leave out"}
_RECOVERY: dict[str, Any] = {"rich_help_panel": "Recovery"}


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    depth: Annotated[
        float | None,
        typer.Option("--depth", metavar="FRACTION", help="Fraction of the layers to leave out, such as 0.25.", **_WHAT),
    ] = None,
    mlp: Annotated[
        float | None,
        typer.Option("--mlp", metavar="FRACTION", help="Fraction of the channels of each MLP to leave out.", **_WHAT),
    ] = None,
    heads: Annotated[
        float | None,
        typer.Option(
            "--heads",
            metavar="FRACTION",
            help="Fraction of the attention heads to leave out, in groups that share a key head.",
            **_WHAT,
        ),
    ] = None,
    experts: Annotated[
        float | None,
        typer.Option("--experts", metavar="FRACTION", help="Fraction of the experts of each layer to leave out.", **_WHAT),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="FILE", help="Sample text to choose on. Default: a built-in text.", **_WHAT),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="Other text to compare the models on. Default: Python's documentation.", **_WHAT
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="PATH",
            help="Train the pruned model on these chats or texts to predict what the original predicts.",
            **_RECOVERY,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="N", help="Number of optimizer steps. Default: 3 epochs.", **_RECOVERY),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", metavar="RATE", help="Learning rate. Default: 2e-5.", **_RECOVERY),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", metavar="TOKENS", help="Tokens per row of training data. Longer texts are split.", **_RECOVERY
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Set any field of DeepSeekTrainingArguments. Repeatable.", **_RECOVERY
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the pruned model if it exists.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Write a smaller model without the parts that matter least.

    Layers are left out by the measured KL divergence without each of them, channels and heads by the error of the layer's
    output on a text, and experts by how often they are used. The result is an ordinary Transformers checkpoint. With --data,
    OUT is the recovered model, and OUT-pruned the one before.
    """
    from deepseek_optimizer.prune.job import PruneConfig, PruneJob

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    job = PruneJob(
        PruneConfig(
            model=model,
            output=str(out),
            fractions=o.not_none(depth=depth, mlp=mlp, heads=heads, experts=experts),
            calibration=calibration,
            text=text,
            recovery=_recovery(data, steps, learning_rate, max_length, more),
            overwrite=force,
        )
    )
    summary = job.run(
        lambda line: typer.echo(f"dso: {line}", err=True), lambda training: run_with_bar(training, "run that command")
    )
    print_json(summary.to_dict()) if as_json else typer.echo(_describe(summary))


def _recovery(
    data: list[str] | None, steps: int | None, learning_rate: float | None, max_length: int | None, more: list[str] | None
) -> dict[str, Any] | None:
    """The training configuration without model and output; None without data."""
    arguments = with_settings(more or [], {"max_steps": steps, "learning_rate": learning_rate})
    if not data:
        if arguments or max_length:
            raise ValueError("--steps, --learning-rate, --max-length and --set train the pruned model, which needs --data")
        return None
    options = {"max_length": max_length, "too_long": "split", "assistant_only": False}
    return {"data": {"train": data, **o.not_none(**options)}, "arguments": arguments}


def _describe(summary: Any) -> str:
    from deepseek_optimizer.prune.report import table

    lines = []
    if summary.left_out:
        order = ", ".join(f"{one.layer} (KL {one.kl:.3f})" for one in summary.left_out)
        lines.append(f"layers left out, in this order: {order}")
    lines += [f"{kind}: {count} stay in each layer" for kind, count in summary.kept.items()]
    lines.append(table(summary.rows))
    if summary.seconds is not None:
        lines.append(f"recovered in {summary.seconds:,.0f} s of training")
    lines.append(f"model: {summary.output}")
    return "\n".join(lines)
