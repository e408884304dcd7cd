"""A benchmark report as one self-contained HTML file: no scripts, fonts or requests; charts are inline SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import atomic_file
from ..errors import ConfigError
from .charts import Bar, Chart, bars, check_available, lines
from .metrics import METRICS
from .sections import Section, name_of, number, sections
from .summary import summary_section

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dde3, #3a4048); --soft: light-dark(#f4f6f8, #1f2328);
  --muted: light-dark(#56606b, #a3adb8); --warn: light-dark(#fff4d6, #453614); --warn-line: light-dark(#d9a514, #c99a1e); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: light-dark(#1b2026, #e6e9ec); background: light-dark(#fff, #15181c); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child, .facts td { text-align: left; }
.facts td:first-child { color: var(--muted); white-space: nowrap; }
.facts td + td { overflow-wrap: anywhere; }
.summary { background: var(--soft); border-radius: .6rem; padding: .6rem 1.1rem; }
.summary h2 { margin: .3rem 0; }
.summary table { width: 100%; }
.summary tr:last-child td { border-bottom: 0; }
@media (max-width: 40rem) {
  .summary td { display: block; border-bottom: 0; padding-right: 0; }
  .summary td:first-child { padding-bottom: 0; font-size: .85rem; }
  .summary td + td { padding-top: 0; border-bottom: 1px solid var(--line); }
}
.warning { background: var(--warn); border-left: .3rem solid var(--warn-line); border-radius: .3rem; padding: .7rem 1rem; }
.note { color: var(--muted); font-size: .9rem; max-width: 48rem; }
figure { margin: 2rem 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; min-width: 34rem; max-width: 50rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; margin-top: 2.5rem; color: var(--muted); }
pre { overflow: auto; max-height: 24rem; font-size: 12px; background: var(--soft); padding: 1rem; border-radius: .4rem; }
"""


def check_target(path: Path) -> None:
    """Whether `write` can write there, before anything is measured.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ConfigError: the path is a directory.
    """
    check_available()
    if path.is_dir():
        raise ConfigError(f"--html {path} is a directory; give the name of a file in it")


def write(path: Path, page: str) -> None:
    """Writes the page whole, or leaves what was there before."""
    with atomic_file(path) as file:
        file.write(page.encode())


def page(report: dict[str, Any]) -> str:
    """The whole file; it contains the report as JSON, too."""
    return page_of(report, f"Benchmark: {report['model']}", plots(report), [summary_section(report), *sections(report)])


def page_of(report: dict[str, Any], title: str, charts: Iterable[Chart], content: Iterable[Section]) -> str:
    """The HTML page of any report: its first section as the summary, then the charts, then the other sections."""
    title = escape(title)
    first, *others = content
    body = [_warning(first), f'<section class="summary">{_section(first)}</section>', *map(_figure, charts)]
    body += [f"{_warning(section)}{_section(section)}" for section in others]
    data = escape(json.dumps(report, indent=1, ensure_ascii=False), quote=False)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main><h1>{title}</h1>{''.join(body)}"
        f"<details><summary>All data as JSON</summary><pre>{data}</pre></details></main></body></html>\n"
    )


def plots(report: dict[str, Any]) -> Iterator[Chart]:
    """One chart per figure that has data."""
    against = [
        _ratio(f"{row['against']}: {METRICS[row['figure']].label}, batch {row['work']['batch']}", row)
        for row in report.get("against", ())
    ]
    if against:
        yield bars("Compared with other engines: how many times better, median and range", against, "ratio", mark=1.0)
    for name in ("decode_tok_s", "prefill_tok_s"):
        works = [(name_of(e["work"]), e["figures"][name]) for e in report["works"] if name in e["figures"]]
        rows = [Bar(label, f["p50"], min(f["samples"]), max(f["samples"]), number(f["p50"])) for label, f in works]
        if rows:
            runs = max(figure["n"] for _, figure in works)
            yield bars(f"{METRICS[name].label.capitalize()} speed: median and range of {runs} runs", rows, METRICS[name].unit)
    gaps = {name_of(e["work"]): sorted(e["figures"]["itl_ms"]["samples"]) for e in report["works"] if "itl_ms" in e["figures"]}
    if gaps:
        title = "Time between tokens, from the shortest to the longest"
        yield lines(title, gaps, "% of the tokens", "ms")
    for batch in dict.fromkeys(row["work"]["batch"] for row in report.get("ablation", ())):
        rows = [
            _ratio(row["variant"], row)
            for row in report["ablation"]
            if row["work"]["batch"] == batch and row["figure"] == "decode_tok_s"
        ]
        yield bars(f"Decode speed without each fusion rule, batch {batch}", rows, "relative to all rules", mark=1.0)


def _ratio(label: str, row: dict[str, Any]) -> Bar:
    return Bar(label, row["better"], row["lowest"], row["highest"], f"{row['better']:.2f}x")


def _figure(chart: Chart) -> str:
    return f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="scroll">{chart.svg}</div></figure>'


def _warning(section: Section) -> str:
    return f'<p class="warning" role="note"><strong>Warning.</strong> {escape(section.warning)}</p>' if section.warning else ""


def _section(section: Section) -> str:
    title = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    head = ""
    if any(section.header):
        head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in section.header)}</tr></thead>"
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in section.rows)
    note = "".join(f'<p class="note">{escape(line)}</p>' for line in section.note.splitlines())
    kind = "" if head else ' class="facts"'
    return f'{title}<div class="scroll"><table{kind}>{head}<tbody>{rows}</tbody></table></div>{note}'
