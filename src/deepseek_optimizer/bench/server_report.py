"""The report of `dso bench --url`: tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .metrics import METRICS
from .sections import Section, number

_PERCENTILES = ("p50", "p90", "p95", "p99")


def sections(report: dict[str, Any]) -> Iterator[Section]:
    """The settings and totals, the times, and the reasons of failures."""
    yield Section("Server", ("", ""), tuple(_summary(report)), warning=_warning(report))
    if report["figures"]:
        yield _times(report)
    if report["failures"]:
        ordered = sorted(report["failures"].items(), key=lambda item: -item[1])
        yield Section("Failed requests", ("reason", "n"), tuple((reason, str(count)) for reason, count in ordered))


def _summary(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    s, totals = report["settings"], report["totals"]
    yield "URL", s["url"]
    yield "model", s["model"]
    arrival = f"{s['rate']:g} requests/s, " if s["rate"] else ""
    yield "load", f"{s['requests']:,} requests, {arrival}at most {s['concurrency']:,} at once"
    yield "lengths", f"about {s['prompt']:,} prompt tokens, {s['new']:,} to generate"
    yield "completed", f"{report['completed']:,} in {number(report['seconds'], 's')}"
    for name, value in totals.items():
        yield METRICS[name].label, number(value, METRICS[name].unit)
    yield "tokens", f"{report['prompt_tokens']:,} of prompts, {report['output_tokens']:,} generated"


def _warning(report: dict[str, Any]) -> str:
    s, said = report["settings"], []
    if report["failed"]:
        said.append(f"{report['failed']:,} of {s['requests']:,} requests failed")
    if not s.get("ignore_eos"):
        said.append("the server refuses ignore_eos, so answers may be shorter than asked for")
    if not report["tokens_were_counted"]:
        said.append("the server does not count tokens (stream_options.include_usage); pieces of answers are counted instead")
    return "; ".join(said)


def _times(report: dict[str, Any]) -> Section:
    rows = tuple(
        (
            f"{METRICS[name].label}, {figure['unit']}",
            *("-" if figure[p] is None else number(figure[p]) for p in _PERCENTILES),
            f"{figure['n']:,}",
        )
        for name, figure in report["figures"].items()
    )
    note = "p95 and p99 need 20 and 100 samples. A token counts from the first piece of its answer on that has text."
    return Section("Times", ("", *_PERCENTILES, "n"), rows, note)
