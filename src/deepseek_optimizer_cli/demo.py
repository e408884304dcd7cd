"""`dso demo`: a real model answers, and a table shows what optimising gained on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def demo(
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help="Processes started for each side. Default: 3, or fewer on a slow machine."),
    ] = None,
    threads: o.Threads = None,
    as_json: o.AsJson = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct, answer a question, and compare with Transformers."""
    from deepseek_optimizer.bench import demo as bench

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    result = bench.run(rounds=rounds, threads=threads, show=not as_json)
    if as_json:
        print_json(result)
