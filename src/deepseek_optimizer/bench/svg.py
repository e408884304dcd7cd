"""Plain charts as SVG text: bars with whiskers, lines, and panels of lines over lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_BAR, _LEFT, _WIDTH, _RIGHT = 22, 250, 460, 110  # pixels: a bar's pitch, room for labels, the plot, room for values
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


@dataclass(frozen=True)
class Bar:
    """low and high: ends of the whisker. text: written beside it."""

    label: str
    value: float
    low: float
    high: float
    text: str


def bars(title: str, rows: Sequence[Bar], mark: float | None = None) -> str:
    """Horizontal bars from zero. mark: where a dashed line stands."""
    largest = max([mark or 0.0, *(max(row.value, row.high) for row in rows)]) or 1.0
    height = 34 + _BAR * len(rows)

    def x(value: float) -> float:
        return round(_LEFT + _WIDTH * value / largest, 1)

    parts = []
    thin = 'stroke="currentColor"'
    for i, row in enumerate(rows):
        y = 28 + i * _BAR
        middle, width = y + 7, round(x(row.value) - _LEFT, 1)
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(row.label)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{width}" height="14" fill="{_COLOURS[0]}" opacity="0.75"/>',
            f'<line x1="{x(row.low)}" x2="{x(row.high)}" y1="{middle}" y2="{middle}" {thin}/>',
            f'<text x="{x(max(row.value, row.high)) + 6}" y="{y + 11}">{escape(row.text)}</text>',
        ]
    if mark is not None:
        parts.append(f'<line x1="{x(mark)}" x2="{x(mark)}" y1="24" y2="{height - 6}" {thin} stroke-dasharray="4 3"/>')
    return _svg(title, height, parts)


def lines(title: str, series: Mapping[str, Sequence[float]], x_label: str, unit: str) -> str:
    """Each series' values in order, over 0 to 100% of its length."""
    height, top, bottom = 260, 30, 210
    largest = max((value for values in series.values() for value in values), default=0.0) or 1.0
    parts = [
        f'<text x="{_LEFT - 8}" y="{top + 4}" text-anchor="end">{largest:.3g} {escape(unit)}</text>',
        f'<text x="{_LEFT - 8}" y="{bottom + 4}" text-anchor="end">0</text>',
        f'<path d="M{_LEFT} {top}V{bottom}H{_LEFT + _WIDTH}" fill="none" stroke="currentColor"/>',
        f'<text x="{_LEFT + _WIDTH}" y="{bottom + 18}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for i, (name, values) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        last = max(len(values) - 1, 1)
        points = " ".join(
            f"{_LEFT + _WIDTH * n / last:.1f},{bottom - (bottom - top) * v / largest:.1f}" for n, v in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="8" y="{top + 34 + 18 * i}" fill="{colour}">{escape(name)}</text>')
    return _svg(title, max(height, top + 50 + 18 * len(series)), parts)


Points = Sequence[tuple[float, float]]  # x above 0, y


def panels(title: str, figures: Mapping[str, Mapping[str, Points]], x_label: str) -> str:
    """Side by side, two a row, one panel a figure: its series over x, which grows by doubling; y begins at 0. A series has the
    same colour in all panels."""
    width, height, left, top, pitch_x, pitch_y = 300, 130, 64, 46, 410, 210  # of a panel's plot, and from one to the next
    names = list(dict.fromkeys(name for series in figures.values() for name in series))
    xs = sorted({x for series in figures.values() for points in series.values() for x, _ in points})
    span = math.log2(xs[-1] / xs[0]) if len(xs) > 1 else 1.0
    parts = []
    for i, name in enumerate(names):
        parts.append(f'<text x="{left + 120 * i}" y="32" fill="{_COLOURS[i % len(_COLOURS)]}">{escape(name)}</text>')
    for number, (figure, series) in enumerate(figures.items()):
        x0, y0 = left + pitch_x * (number % 2), top + 18 + pitch_y * (number // 2)
        largest = max((y for points in series.values() for _, y in points), default=0.0) or 1.0
        parts += [
            f'<text x="{x0}" y="{y0 - 8}">{escape(figure)}</text>',
            f'<text x="{x0 - 6}" y="{y0 + 8}" text-anchor="end">{largest:{",.0f" if largest >= 100 else ".3g"}}</text>',
            f'<text x="{x0 - 6}" y="{y0 + height}" text-anchor="end">0</text>',
            f'<path d="M{x0} {y0}v{height}h{width}" fill="none" stroke="currentColor"/>',
            f'<text x="{x0 + width}" y="{y0 + height + 32}" text-anchor="end">{escape(x_label)}</text>',
        ]
        places = {x: x0 + width * (math.log2(x / xs[0]) / span if len(xs) > 1 else 0.5) for x in xs}
        parts += [
            f'<text x="{at:.1f}" y="{y0 + height + 16}" text-anchor="middle">{_short(x)}</text>' for x, at in places.items()
        ]
        for name, points in series.items():
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            spots = [(f"{places[x]:.1f}", f"{y0 + height - height * y / largest:.1f}") for x, y in points]
            joined = " ".join(",".join(spot) for spot in spots)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in spots]
    return _svg(title, top + pitch_y * -(-len(figures) // 2), parts)


def _short(x: float) -> str:
    return f"{x / 1024:.3g}K" if x >= 1024 else f"{x:.3g}"


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    width = _LEFT + _WIDTH + _RIGHT
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f'<title>{escape(title)}</title><text x="0" y="14" font-weight="bold">{escape(title)}</text>{"".join(parts)}</svg>'
    )
