"""`dso bench MODEL --long`: accuracy, speed and memory of the attention modes on long texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model import print_json


def bench_long(
    model: str,
    fields: dict[str, Any],
    lengths: str | None,
    modes: str | None,
    tasks: str | None,
    samples: int,
    html: Path | None,
    as_json: bool,
) -> None:
    """lengths, modes, tasks: comma-separated; None: the defaults of `LongRequest`."""
    from rich.console import Console

    from deepseek_optimizer.bench.html import write
    from deepseek_optimizer.bench.long.report import page, sections
    from deepseek_optimizer.bench.long.run import LongRequest, run
    from deepseek_optimizer.bench.terminal import show_sections
    from deepseek_optimizer.bench.work import numbers
    from deepseek_optimizer.system.progress import show_progress

    options: dict[str, Any] = {"lengths": numbers(lengths)} if lengths is not None else {}
    options |= {name: _names(text) for name, text in (("modes", modes), ("tasks", tasks)) if text is not None}
    request = LongRequest(model=model, fields=fields, samples=samples, **options)
    with show_progress("Processing long texts") as progress:
        report = run(request, progress)
    show_sections(Console(highlight=False), sections(report))
    if html:
        write(html, page(report))
    if as_json:
        print_json(report)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
