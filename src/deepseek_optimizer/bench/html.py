"""A report as one HTML file that needs nothing else: no script, no font, no request; plots are inline SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from .figures import KINDS
from .sections import Section, name_of, number, sections
from .svg import Bar, bars, lines

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, table.facts td { text-align: left; }
svg { width: 100%; height: auto; margin: 1rem 0; }
pre { overflow: auto; max-height: 20rem; font-size: 12px; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole file. The report itself is in it, as JSON."""
    return page_of(report, f"Benchmark of {report['model']}", plots(report), sections(report))


def page_of(report: dict[str, Any], title: str, shown: Iterable[str], found: Iterable[Section]) -> str:
    """The same of any report: plots, then tables."""
    title = escape(title)
    body = "".join(map(_section, found))
    data = escape(json.dumps(report, indent=1, ensure_ascii=False), quote=False)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>{''.join(shown)}{body}"
        f"<details><summary>All of it as JSON</summary><pre>{data}</pre></details></body></html>\n"
    )


def plots(report: dict[str, Any]) -> Iterator[str]:
    """One chart a figure that has something to compare."""
    for figure in ("decode_tok_s", "prefill_tok_s"):
        found = [(name_of(e["work"]), e["figures"][figure]) for e in report["works"] if figure in e["figures"]]
        rows = [Bar(name, f["p50"], min(f["samples"]), max(f["samples"]), number(f["p50"])) for name, f in found]
        if rows:
            yield bars(f"{KINDS[figure].label}, {KINDS[figure].unit}: median, lowest and highest", rows)
    gaps = {name_of(e["work"]): sorted(e["figures"]["itl_ms"]["samples"]) for e in report["works"] if "itl_ms" in e["figures"]}
    if gaps:
        yield lines("Between tokens, from the shortest gap to the longest", gaps, "100% of the tokens", "ms")
    for batch in dict.fromkeys(row["work"]["batch"] for row in report.get("ablation", ())):
        rows = [
            _ratio(row["variant"], row)
            for row in report["ablation"]
            if row["work"]["batch"] == batch and row["figure"] == "decode_tok_s"
        ]
        yield bars(f"Decode speed without a fusion rule, batch {batch}, of the speed with all", rows, mark=1.0)
    against = [
        _ratio(f"{row['against']}: {KINDS[row['figure']].label}, batch {row['work']['batch']}", row)
        for row in report.get("against", ())
    ]
    if against:
        yield bars("Times better than a peer", against, mark=1.0)


def _ratio(label: str, row: dict[str, Any]) -> Bar:
    return Bar(label, row["better"], row["lowest"], row["highest"], f"{row['better']:.2f}x")


def _section(section: Section) -> str:
    title = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    head = ""
    if any(section.header):
        head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in section.header)}</tr></thead>"
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in section.rows)
    note = "".join(f"<p>{escape(line)}</p>" for line in section.note.splitlines())
    kind = "" if head else ' class="facts"'
    return f"{title}<table{kind}>{head}<tbody>{rows}</tbody></table>{note}"
