"""`dso bench --url URL`: load on a running server, and its latency and throughput."""

from __future__ import annotations

from typing import Any

import typer

from .model import print_json


def bench_server(prompt: str, new: str, as_json: bool, **settings: Any) -> None:
    """Measures a server.

    Args:
        prompt, new: numbers of tokens.
        settings: further fields of `LoadRequest`.
    """
    from rich.console import Console

    from deepseek_optimizer.bench.server_load import LoadRequest, run
    from deepseek_optimizer.bench.server_report import sections
    from deepseek_optimizer.bench.terminal import show_sections
    from deepseek_optimizer.system.progress import show_progress

    request = LoadRequest(prompt=_one(prompt, "--prompt"), new=_one(new, "--new"), **settings)
    with show_progress(f"Sending {request.count:,} requests") as progress:
        report = run(request, progress)
    show_sections(Console(highlight=False), sections(report))
    if as_json:
        print_json(report)
    if report["failed"]:
        raise typer.Exit(1)


def _one(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} must be one number of tokens with --url, got {text!r}") from None
