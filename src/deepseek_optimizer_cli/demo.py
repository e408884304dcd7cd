"""`dso demo`: a real model answers a question, and a table compares it with Transformers on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def demo(
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            metavar="N",
            help="Number of runs of each side; medians are shown. Default: 3, or fewer on a slow machine.",
        ),
    ] = None,
    threads: o.Threads = None,
    as_json: o.AsJson = False,
) -> None:
    """Download SmolLM2-135M-Instruct, answer a question, and compare its speed with Transformers."""
    from deepseek_optimizer.bench import demo as bench

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    result = bench.run(rounds=rounds, threads=threads, show=not as_json)
    if as_json:
        print_json(result)
