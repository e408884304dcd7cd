"""The report of a search: tables for the terminal, and an HTML page with a picture of speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..bench.charts import Chart
from ..bench.html import page_of
from ..bench.sections import Section
from .search import Found, Trial
from .settings import Figures

_WIDTH, _HEIGHT, _MARGIN = 640.0, 360.0, 56.0


def tune_report(found: Found, goal: str, trace: str, facts: dict[str, Any], model: str, profile: str) -> dict[str, Any]:
    """The report, of JSON types.

    Args:
        found: the result.
        goal, trace, facts: what was searched for, by which trace; see `traces.describe`.
        model: its name.
        profile: where the profile was written; "" if it was not.
    """
    return {
        "model": model, "goal": goal, "trace": trace, "requests": facts, "profile": profile, **found.to_dict(),
        "prediction_error": found.predictions.error,
    }  # fmt: skip


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other one is at least as good as in speed, memory and quality, and better in one of them."""
    measured = [one for one in trials if one.figures is not None]
    found: list[Trial] = []
    for one in measured:
        if not any(_dominates(other, one) for other in measured) and all(one.settings != known.settings for known in found):
            found.append(one)
    return found


def _dominates(a: Trial, b: Trial) -> bool:
    assert a.figures is not None and b.figures is not None
    first, second = _costs(a.figures), _costs(b.figures)
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))


def _costs(figures: Figures) -> tuple[float, float, float]:
    return -figures.tok_s, figures.memory_bytes, figures.kl


def sections(found: Found, goal: str, trace: str, profile: str) -> list[Section]:
    """The result with how well the cost model predicted, the best compromises, all trials, and what was predicted of them."""
    sides = [("defaults", found.defaults, found.default_figures)]
    if found.best != found.defaults:
        sides.append(("found", found.best, found.best_figures))
    rows = tuple((name, str(settings), *_cells(figures)) for name, settings, figures in sides)
    verdict = (
        "The defaults stay: no settings were better in every pair, and by more than 3%."
        if found.best == found.defaults
        else f"{100 * found.gain:.0f}% better than the defaults at the goal."
    )
    note = f"{verdict} {'Profile: ' + profile if profile else 'No profile was written.'}"
    first = Section(f"Goal {goal}, trace {trace}", ("", "settings", *_HEADER), rows, f"{note} {_predictions(found)}")
    front = tuple((str(one.settings), *_cells(one.figures)) for one in pareto(found.trials) if one.figures is not None)
    others = tuple(
        (str(one.settings), *(_cells(one.figures) if one.figures else (one.error, "", "", "", ""))) for one in found.trials
    )
    predicted = [one for one in found.trials if one.predicted is not None and one.figures is not None]
    return [
        first,
        Section("Best compromises of speed, memory and quality", ("settings", *_HEADER), front),
        Section("All settings that were measured", ("settings", *_HEADER), others),
        Section("What the cost model predicted of them", ("settings", *_PREDICTED), tuple(map(_prediction, predicted))),
    ]


def _predictions(found: Found) -> str:
    """A sentence about the cost model."""
    made = found.predictions
    text = f"{len(found.trials)} settings measured, {made.simulated} simulated by a cost model"
    if made.steps:
        text += f" fitted to {made.steps:,} steps (median error of a step {made.step_error:.0%})"
    if made.error is None:
        return f"{text}."
    errors = f"{made.error:.0%}, at most {max(map(abs, made.errors)):.0%}"
    return f"{text}. Its error at the goal for {len(made.errors)} settings before they were measured: median {errors}."


def _prediction(trial: Trial) -> tuple[str, ...]:
    assert trial.predicted is not None and trial.figures is not None
    cells = []
    for name, shown in (("latency_s", "{:.3f} s"), ("first_s", "{:.3f} s"), ("tok_s", "{:,.0f}")):
        said, was = getattr(trial.predicted, name), getattr(trial.figures, name)
        cells.append(f"{shown.format(said)} ({said / was - 1:+.0%})")
    said, was = trial.predicted.memory_bytes, trial.figures.memory_bytes
    return (str(trial.settings), *cells, f"{said / 1e6:,.1f} MB ({said / was - 1:+.0%})")


_HEADER = ("latency", "first token", "tok/s", "memory", "KL")
_PREDICTED = _HEADER[:-1]


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        f"{figures.latency_s:.3f} s", f"{figures.first_s:.3f} s", f"{figures.tok_s:,.0f}",
        f"{figures.memory_bytes / 1e6:,.1f} MB", f"{figures.kl:.4f}",
    )  # fmt: skip


def page(report: dict[str, Any], found: Found) -> str:
    """The whole HTML file, without scripts, fonts or requests."""
    content = sections(found, report["goal"], report["trace"], report["profile"])
    charts = [picture(found)]
    if any(one.figures is not None and one.figures.kl for one in found.trials):
        charts.append(quality_picture(found))
    return page_of(report, f"Settings of {report['model']}", charts, content)


def picture(found: Found) -> Chart:
    """Memory against speed, one point for each setting that was measured: filled if it is a best compromise, large if chosen, a
    square if its formats change answers."""
    title = "Speed and memory of all settings that were measured"
    note = "filled are best compromises, the large one was chosen, squares have other formats, which change answers a little"
    return _points(found, title, note, "tokens per second", lambda figures: figures.tok_s, "{:,.0f}")


def quality_picture(found: Found) -> Chart:
    """Memory against the KL divergence, with the same points."""
    title = "Quality and memory"
    return _points(found, title, "the same points; lower is closer to the model as it was given", "KL divergence, nats",
                   lambda figures: figures.kl, "{:.4f}")  # fmt: skip


def _points(found: Found, title: str, note: str, y_label: str, y_of: Callable[[Figures], float], y_shown: str) -> Chart:
    """A chart with a figure of each setting that was measured over its memory."""
    shown = [(one, one.figures) for one in found.trials if one.figures is not None]
    front = {one.settings for one in pareto(found.trials)}
    xs, ys = [f.memory_bytes / 1e6 for _, f in shown], [y_of(f) for _, f in shown]
    x_range, y_range = _range(xs), _range(ys)
    marks, texts = [], []
    for (trial, figures), x, y in zip(shown, xs, ys, strict=True):
        px = _MARGIN + (x - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - 2 * _MARGIN)
        py = _HEIGHT - _MARGIN - (y - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - 2 * _MARGIN)
        text = escape(f"{trial.settings}: {', '.join(_cells(figures))}")
        size = 8 if trial.settings == found.best else 5
        look = 'fill="#2f7de1"' if trial.settings in front else 'fill="none" stroke="#2f7de1"'
        shape = (
            f'<rect x="{px - size:.1f}" y="{py - size:.1f}" width="{2 * size}" height="{2 * size}" {look}>'
            if figures.kl
            else f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size}" {look}>'
        )
        marks.append(f"{shape}<title>{text}</title></{'rect' if figures.kl else 'circle'}>")
        texts.append(text)
    left, bottom, right, top = _MARGIN, _HEIGHT - _MARGIN, _WIDTH - _MARGIN, _MARGIN
    label = 'fill="currentColor" font-size="12"'
    axes = (
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="currentColor"/>'
        f'<text x="{right}" y="{bottom + 36}" text-anchor="end" {label}>memory, MB</text>'
        f'<text x="{left}" y="{top - 12}" {label}>{y_label}</text>'
        f'<text x="{left}" y="{bottom + 18}" {label}>{x_range[0]:,.1f}</text>'
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end" {label}>{x_range[1]:,.1f}</text>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end" {label}>{y_shown.format(y_range[0])}</text>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end" {label}>{y_shown.format(y_range[1])}</text>'
    )
    return Chart(
        f"{title}: {note}",
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{title}</title><desc>{'; '.join(texts)}</desc>{axes}{''.join(marks)}</svg>",
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    edge = 0.05 * (high - low) or max(1.0, 0.05 * abs(high))
    return max(0.0, low - edge), high + edge
