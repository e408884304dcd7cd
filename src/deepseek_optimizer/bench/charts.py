"""Charts as SVG text, drawn by matplotlib (the extra `bench`): bars with ranges, lines, and panels over lengths.

Axes and text use the page's text color, so that a chart fits a light and a dark page. Each chart has an accessible title and a
description that gives its values as text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import MissingPackageError

_INK = "#010203"  # matplotlib needs a color; the SVG gets `currentColor` in its place
_COLOURS = ("#2f7de1", "#d97706", "#0f9f6e", "#dc4b4b", "#8b5cf6", "#0891b2", "#c0408a", "#5f8a1f")
_WIDTH = 7.6  # inches
Points = Sequence[tuple[float, float]]  # x above 0, y


@dataclass(frozen=True)
class Chart:
    """title: plain text, shown above the chart. svg: one `<svg>` element."""

    title: str
    svg: str


@dataclass(frozen=True)
class Bar:
    """low, high: ends of the range line. text: the value as written beside the bar."""

    label: str
    value: float
    low: float
    high: float
    text: str


def check_available() -> None:
    """Raises MissingPackageError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("--html, which draws charts,", "matplotlib", "bench")


def bars(title: str, rows: Sequence[Bar], unit: str, mark: float | None = None) -> Chart:
    """Horizontal bars from zero, each with its range. mark: x of a dashed reference line."""
    with _figure(title, 0.9 + 0.36 * len(rows)) as figure:
        axes = figure.subplots()
        places = range(len(rows))
        spread = [[row.value - row.low for row in rows], [row.high - row.value for row in rows]]
        axes.barh(places, [row.value for row in rows], height=0.6, color=_COLOURS[0], alpha=0.8)
        axes.errorbar([row.value for row in rows], places, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=3)
        largest = max([mark or 0.0, *(max(row.value, row.high) for row in rows)]) or 1.0
        for place, row in zip(places, rows, strict=True):
            right = max(row.value, row.high)
            if mark is not None and right < mark < right + 0.12 * largest:
                right = mark  # the text would lie across the reference line
            axes.text(right + 0.015 * largest, place, row.text, va="center", color=_INK)
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=1, linestyle="--")
        axes.set_xlim(0, 1.15 * largest)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(places, [row.label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)
        text = "; ".join(f"{row.label}: {row.text}" for row in rows)
        return _chart(figure, title, text)


def lines(title: str, series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Chart:
    """Each series' values in order, over 0 to 100% of its length; y starts at 0."""
    with _figure(title, 3.0) as figure:
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            last = max(len(values) - 1, 1)
            x = [100 * i / last for i in range(len(values))]
            axes.plot(x, values, color=_COLOURS[number % len(_COLOURS)], linewidth=1.5, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 100)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes)
        text = "; ".join(f"{name}: {min(v):.3g} to {max(v):.3g}" for name, v in series.items() if v)
        return _chart(figure, title, text)


def panels(title: str, figures: Mapping[str, Mapping[str, Points]], x_label: str) -> Chart:
    """Two panels per row, one for each figure: its series over x on a logarithmic scale; y starts at 0. A series has the same
    color in all panels."""
    names = list(dict.fromkeys(name for series in figures.values() for name in series))
    xs = sorted({x for series in figures.values() for points in series.values() for x, _ in points})
    rows = -(-len(figures) // 2)
    with _figure(title, 2.4 * rows) as figure:
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, (label, series) in zip(grid.flat, figures.items(), strict=False):
            for name, points in series.items():
                color = _COLOURS[names.index(name) % len(_COLOURS)]
                axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1.5, markersize=4, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, [_thousands(x) for x in xs])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_title(label, loc="left", fontsize=10, color=_INK)
            axes.set_xlabel(x_label)
        for axes in grid.flat[len(figures) :]:
            axes.set_axis_off()
        if names:
            _legend(grid.flat[0])
        text = "; ".join(
            f"{label}, {name}: {', '.join(f'{y:.4g} at {_thousands(x)}' for x, y in points)}"
            for label, series in figures.items()
            for name, points in series.items()
        )
        return _chart(figure, title, text)


def _thousands(x: float) -> str:
    return f"{x / 1024:.3g}K" if x >= 1024 else f"{x:.3g}"


@contextmanager
def _figure(title: str, height: float) -> Iterator[Any]:
    """A matplotlib figure, apart from pyplot and its global state. height: inches."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": title,  # names of elements are the same in each run
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _chart(figure: Any, title: str, text: str) -> Chart:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = out.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    prefix = hashlib.sha256(f"{title} {text}".encode()).hexdigest()[:8] + "-"  # names are unique among the charts of a page
    svg = svg.replace(_INK, "currentColor")
    for begin in (' id="', 'href="#', "url(#"):
        svg = svg.replace(begin, begin + prefix)
    head, rest = svg.split(">", 1)
    head += f' role="img" aria-labelledby="{prefix}title {prefix}desc"'
    named = f'<title id="{prefix}title">{escape(title)}</title><desc id="{prefix}desc">{escape(text)}</desc>'
    return Chart(title, f"{head}>{named}{rest.rstrip()}")
