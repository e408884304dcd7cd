"""What a report of long texts shows: tables, which the terminal and the HTML page share, and a plot for the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..html import page_of
from ..sections import Section, number
from ..svg import panels

# Figure of a row -> (how a plot calls it, by how much it is divided there).
_PLOTTED = {
    "mean": ("accuracy, %", 0.01),
    "ttft_s": ("first token, s", 1.0),
    "prefill_tok_s": ("prefill, tok/s", 1.0),
    "decode_tok_s": ("decode, tok/s", 1.0),
    "memory_bytes": ("peak memory above the model, MB", 1e6),
}


def sections(report: dict[str, Any]) -> Iterator[Section]:
    """The facts, one table of all modes and lengths, and the accuracy task by task."""
    yield Section("", ("", ""), tuple(_facts(report)))
    yield _modes(report)
    yield _tasks(report)


def page(report: dict[str, Any]) -> str:
    """The whole HTML file."""
    return page_of(report, f"Long texts: {report['model']}", [plot(report)], sections(report))


def plot(report: dict[str, Any]) -> str:
    """SVG: each figure over the lengths, a line a mode."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for figure, (label, unit) in _PLOTTED.items():
        series = found.setdefault(label, {})
        for row in _by_length(report["rows"]):
            if row.get(figure) is not None:
                series.setdefault(row["mode"], []).append((row["length"], row[figure] / unit))
    return panels("Modes of attention over long texts", found, "tokens")


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", report["model"]
    threads = {str(side["threads"]) for side in report["sides"].values() if side and side["threads"]}
    yield "machine", f"{report['cpu']}{', ' + '/'.join(sorted(threads)) + ' threads' if threads else ''}"
    for mode, side in report["sides"].items():
        yield mode, f"{side['backend']}, loaded in {number(side['load_s'], 's')}" if side else "not to be had"
    for name, value in report["config"].items():
        yield name, str(value)
    yield "versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def _modes(report: dict[str, Any]) -> Section:
    rows = tuple((_name(row), *_cells(row)) for row in _by_length(report["rows"]))
    header = ("tokens, mode", "accuracy", "TTFT, s", "prefill/s", "decode/s", "memory")
    reasons: dict[str, list[str]] = {}
    for row in _by_length(report["rows"]):
        if row["error"] is not None:
            reasons.setdefault(row["error"], []).append(_name(row))
    note = (
        f"{report['samples']} of each task at each length. Accuracy: share of the answers that were given. TTFT: seconds to "
        "the first token; prefill and decode in tokens a second; medians. Memory: peak above the loaded model."
    )
    note += "".join(f"\n{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return Section("Long texts", header, rows, note)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return ("-",) * 5
    memory = "-" if row["memory_bytes"] is None else number(row["memory_bytes"], "bytes")
    return (
        _percent(row["mean"]), number(row["ttft_s"]), number(row["prefill_tok_s"]), number(row["decode_tok_s"]), memory,
    )  # fmt: skip


def _tasks(report: dict[str, Any]) -> Section:
    tasks = tuple(report["tasks"])
    rows = tuple(
        (_name(row), *(_percent(row["accuracy"][task]) for task in tasks))
        for row in _by_length(report["rows"])
        if row["error"] is None
    )
    return Section("Accuracy by task", ("tokens, mode", *tasks), rows)


def _by_length(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modes side by side."""
    return sorted(rows, key=lambda row: row["length"])


def _name(row: dict[str, Any]) -> str:
    return f"{row['length']:,} {row['mode']}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
