"""The report of `dso bench --long`: tables for the terminal and the HTML page, and a chart for the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..charts import Chart, panels
from ..html import page_of
from ..sections import Section, number
from ..summary import date_text, load_text, machine_text, rounded, versions_text, warning

# Figure of a row -> (its label in the chart, the divisor to its unit there).
_PLOTTED = {
    "mean": ("accuracy, %", 0.01),
    "ttft_s": ("time to first token, s", 1.0),
    "prefill_tok_s": ("prefill, tok/s", 1.0),
    "decode_tok_s": ("decode, tok/s", 1.0),
    "memory_bytes": ("peak memory above the model, MB", 1e6),
}


def sections(report: dict[str, Any]) -> Iterator[Section]:
    """The summary, one table of all modes and lengths, and the accuracy of each task."""
    yield Section("Summary", ("", ""), tuple(_summary(report)), warning=warning(report["load"]))
    yield _modes(report)
    yield _tasks(report)


def page(report: dict[str, Any]) -> str:
    """The complete HTML file."""
    return page_of(report, f"Benchmark on long texts: {report['model']}", [plot(report)], sections(report))


def plot(report: dict[str, Any]) -> Chart:
    """Each figure over the lengths, one line per mode."""
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for figure, (label, unit) in _PLOTTED.items():
        series = figures.setdefault(label, {})
        for row in _by_length(report["rows"]):
            if row.get(figure) is not None:
                series.setdefault(row["mode"], []).append((row["length"], row[figure] / unit))
    return panels("Attention modes on long texts", figures, "tokens")


def _summary(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Model", report["model"]
    measured = [row for row in report["rows"] if row["error"] is None]
    if measured:
        length = max(row["length"] for row in measured)
        for row in (row for row in measured if row["length"] == length):
            yield f"{length:,} tokens, {row['mode']}", _sentence(row)
    yield "Machine", machine_text(report)
    yield "Date", date_text(report)
    yield "Other load", load_text(report["load"])
    for mode, side in report["sides"].items():
        text = (
            f"{side['backend']}, {side['threads']} threads, loaded in {number(side['load_s'], 's')}"
            if side
            else "not available"
        )
        yield f"Mode {mode}", text
    for name, value in report["config"].items():
        yield name, str(value)
    yield "Versions", versions_text(report["versions"])


def _sentence(row: dict[str, Any]) -> str:
    memory = "" if row["memory_bytes"] is None else f", {number(row['memory_bytes'], 'bytes')} of memory besides the model"
    return (
        f"{_percent(row['mean'])} of the answers correct, first token after {rounded(row['ttft_s'])} s, "
        f"then {rounded(row['decode_tok_s'])} tokens/s{memory}"
    )


def _modes(report: dict[str, Any]) -> Section:
    rows = tuple((_name(row), *_cells(row)) for row in _by_length(report["rows"]))
    header = ("tokens, mode", "accuracy", "TTFT, s", "prefill, tok/s", "decode, tok/s", "memory")
    reasons: dict[str, list[str]] = {}
    for row in _by_length(report["rows"]):
        if row["error"] is not None:
            reasons.setdefault(row["error"], []).append(_name(row))
    note = (
        f"{report['samples']} samples per task and length. Accuracy: share of the expected answers found. TTFT: time to "
        "first token; prefill and decode in tokens/s; medians. Memory: peak above the loaded model."
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
    """Sorted by length, so that modes of the same length are adjacent."""
    return sorted(rows, key=lambda row: row["length"])


def _name(row: dict[str, Any]) -> str:
    return f"{row['length']:,} {row['mode']}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
