"""A benchmark report as titled tables of text, shown both in the terminal and in the HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .metrics import METRICS
from .work import Work

SHOWN = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "prefill_tok_s", "decode_tok_s", "output_tok_s", "requests_s")


@dataclass(frozen=True)
class Section:
    """header, rows: text; the first column contains names. note: explains the figures. warning: shown above the table."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    warning: str = ""


def sections(report: dict[str, Any]) -> Iterator[Section]:
    """Those for which the report has data, without the summary (`summary.summary_section`)."""
    for entry in report["works"]:
        yield _work(entry)
    if "quality" in report:
        yield _quality(report["quality"])
    if "pairs" in report:
        pairs = report["pairs"]
        rows = [(label, f"{pairs[key]:.1f}", pairs[f"{key}_signature"]) for label, key in (("BLEU", "bleu"), ("chrF", "chrf"))]
        yield Section(f"Answers to {pairs['pairs']} sources", ("", "score", "signature"), tuple(rows))
    if "ablation" in report:
        yield _ablation(report["ablation"])
    if "against" in report:
        yield _against(report["against"])
    if "baseline" in report:
        yield _baseline(report["baseline"])
    yield Section("Configuration", ("", ""), tuple(_configuration(report)))


def name_of(work: dict[str, Any] | None) -> str:
    return str(Work(**work)) if work else "whole run"


def number(value: float, unit: str = "") -> str:
    """At least three significant digits; bytes as MB."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{digits}f} {unit}".rstrip()


def _configuration(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "backend", report["backend"]
    yield "weights", ", ".join(f"{name} {number(size, 'bytes')}" for name, size in report["formats"].items())
    yield "load time", number(report["load_s"], "s")
    if report["memory_bytes"] is not None:
        yield "peak memory", f"{number(report['memory_bytes'], 'bytes')} above a process that has only imported this package"
    for name, value in report["config"].items():
        yield name, str(value)


def _work(entry: dict[str, Any]) -> Section:
    figures = {name: entry["figures"][name] for name in SHOWN if name in entry["figures"]}
    percentiles = [p for p in ("p95", "p99") if any(figure[p] is not None for figure in figures.values())]
    rows = []
    for name, figure in figures.items():
        values = [number(value) for value in (figure["p50"], min(figure["samples"]), max(figure["samples"]))]
        values += ["-" if figure[p] is None else number(figure[p]) for p in percentiles]
        rows.append((f"{METRICS[name].label}, {figure['unit']}", *values, str(figure["n"])))
    header = ("", "median", "lowest", "highest", *percentiles, "n")
    return Section(name_of(entry["work"]), header, tuple(rows), " ".join(_meaning(entry)))


def _meaning(entry: dict[str, Any]) -> Iterator[str]:
    limits = entry["limits"]
    if limits:
        if "read_gb_s" in limits:
            yield (
                f"Each token reads {number(limits['token_bytes'], 'bytes')}: {limits['read_gb_s']:.1f} GB/s, "
                f"{limits['bandwidth_percent']:.0f}% of the {limits['machine_read_gb_s']:.1f} GB/s of that memory itself."
            )
        yield (
            f"Prefill computes {limits['prefill_tera']:.3f} T operations/s, {limits['matrix_percent']:.0f}% of "
            f"{limits['matrix_percent_of']}."
        )
    if entry["watts"] is not None:
        yield f"{entry['watts']:.1f} W (RAPL, processor packages), {entry['joules_per_token']:.3f} J per token."
    if (cost := entry["cost"]) is not None:
        yield f"{cost_text(cost)}."


def cost_text(cost: dict[str, float]) -> str:
    """What a million tokens cost: "in", those of prompts."""
    return "A million tokens cost " + ", ".join(f"{price:.3f} {kind}" for kind, price in cost.items())


def _quality(quality: dict[str, Any]) -> Section:
    rows = (
        ("KL divergence, mean (nats)", f"{quality['kl_mean']:.5f}"),
        ("KL divergence, median", f"{quality['kl_median']:.5f}"),
        ("KL divergence, 99.9th percentile", f"{quality['kl_999']:.5f}"),
        ("same most likely token", f"{quality['same_top_percent']:.2f}%"),
        ("perplexity ratio", f"{quality['perplexity_ratio']:.4f} +- {quality['perplexity_ratio_error']:.4f}"),
        ("perplexity", f"{quality['perplexity']:.3f} (unoptimized: {quality['reference_perplexity']:.3f})"),
    )
    note = f"On {quality['tokens']:,} tokens of {quality['text']}, against the unoptimized model in fp32."
    return Section("Quality", ("", ""), rows, note)


def _ablation(rows: list[dict[str, Any]]) -> Section:
    batches = list(dict.fromkeys(row["work"]["batch"] for row in rows))
    figures = list(dict.fromkeys(row["figure"] for row in rows))
    cells = {(r["variant"], r["work"]["batch"], r["figure"]): f"{r['side']:,.1f} ({r['better']:.2f}x)" for r in rows}
    header = ("tok/s", *(f"{METRICS[f].label}, batch {b}" for b in batches for f in figures))
    names = dict.fromkeys(row["variant"] for row in rows)
    body = tuple((name, *(cells[name, b, f] for b in batches for f in figures)) for name in names)
    title = f"Fusion rules, {rows[0]['work']['prompt']:,}-token prompt"
    return Section(title, header, body, "In parentheses: relative to the speed with all rules, median over the rounds.")


def _against(rows: list[dict[str, Any]]) -> Section:
    body = tuple(
        (
            f"{row['against']}: {METRICS[row['figure']].label}",
            name_of(row["work"]),
            number(row["baseline"], row["unit"]),
            number(row["side"], row["unit"]),
            f"{row['better']:.2f}x ({row['lowest']:.2f} - {row['highest']:.2f})",
        )
        for row in rows
    )
    note = (
        "Each side runs in a separate process, and the sides take turns. Ratio: median, lowest and highest of the "
        "rounds; above 1, this model is better."
    )
    return Section("Compared with other engines", ("", "workload", "theirs", "this model", "ratio"), body, note)


def _baseline(rows: list[dict[str, Any]]) -> Section:
    body = tuple(
        (
            name_of(row["work"]),
            row["figure"],
            number(row["before"], row["unit"]),
            number(row["now"], row["unit"]),
            f"{row['change_percent']:+.1f}%",
            f"{row['noise_percent']:.1f}%",
            "REGRESSED" if row["regressed"] else "",
        )
        for row in rows
    )
    return Section("Compared with the baseline", ("workload", "figure", "before", "now", "regression", "allowed", ""), body)
