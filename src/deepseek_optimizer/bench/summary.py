"""The summary at the top of a benchmark report: speed, comparison, quality, cost, machine and date in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ..system.progress import duration
from .sections import Section, cost_text, number

_COMPARED = {"decode_tok_s": "generates", "ttft_ms": "reaches the first token"}


def summary_section(report: dict[str, Any]) -> Section:
    """Rows of (topic, sentence); the note warns if the machine was busy."""
    return Section("Summary", ("", ""), tuple(_rows(report)), warning=warning(report["load"]))


def warning(load: dict[str, Any]) -> str:
    """One sentence if other processes disturbed the measurement, "" otherwise."""
    if not load["busy"]:
        return ""
    return f"The machine was busy, so the timings are unreliable: {'; '.join(load['busy'])}. Measure again on an idle machine."


def rounded(value: float) -> str:
    """Three significant digits, or all those of the integer part."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def machine_text(report: dict[str, Any]) -> str:
    """CPU, cores used and available, and memory."""
    used = f", {report['threads']} of {report['load']['cores']} cores used" if report.get("threads") else ""
    return f"{report['cpu']}{used}, {report['machine_memory_bytes'] / 2**30:.1f} GiB of memory"


def date_text(report: dict[str, Any]) -> str:
    """When the measurement started, and how long it took."""
    return f"{datetime.fromisoformat(report['date']):%Y-%m-%d %H:%M %Z}, took {duration(report['seconds'])}"


def load_text(load: dict[str, Any]) -> str:
    """CPU use by other processes, and the load average."""
    texts = []
    if load["others_before"] is not None and load["others_during"] is not None:
        before, during = load["others_before"], load["others_during"]
        texts.append(f"Other processes used {before:.1f} cores before and {during:.1f} during the measurement")
    if load["load_average"] is not None:
        texts.append(f"load average of the minute before: {load['load_average']:.1f}")
    return "; ".join(texts) or "unknown on this system"


def versions_text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    main = next((entry for entry in report["works"] if entry["work"]["batch"] == 1), report["works"][0])
    yield "Model", f"{report['model']}; weights in {' and '.join(report['formats'])}"
    yield "Speed", _speed(main)
    largest = max(report["works"], key=lambda entry: entry["work"]["batch"])
    if largest["work"]["batch"] > main["work"]["batch"] and "decode_tok_s" in largest["figures"]:
        speed = rounded(largest["figures"]["decode_tok_s"]["p50"])
        yield "Throughput", f"{speed} tokens/s for {largest['work']['batch']} concurrent requests together"
    comparisons = list(_comparisons(report, main["work"]))
    for text in comparisons or ["Nothing else; --against measures other engines, too"]:
        yield "Compared with", text
    yield "Quality", _quality(report.get("quality"))
    yield "Cost", "; ".join(_cost(report, main))
    yield "Machine", machine_text(report)
    yield "Date", date_text(report)
    yield "Other load", load_text(report["load"])
    yield "Versions", versions_text({**report["versions"], **report.get("peers", {})})


def _speed(entry: dict[str, Any]) -> str:
    work, figures = entry["work"], entry["figures"]
    requests = "one request" if work["batch"] == 1 else f"{work['batch']} concurrent requests"
    first = f"first token of a {work['prompt']:,}-token prompt after {rounded(figures['ttft_ms']['p50'])} ms"
    if "decode_tok_s" not in figures:
        return f"{first}, for {requests}"
    speed = figures["decode_tok_s"]
    return f"{rounded(speed['p50'])} tokens/s generated for {requests}; {first} (medians of {speed['n']} runs)"


def _comparisons(report: dict[str, Any], work: dict[str, Any]) -> Iterator[str]:
    """One sentence per peer, about the work of the headline."""
    rows = [row for row in report.get("against", ()) if row["work"] == work]
    for peer in dict.fromkeys(row["against"] for row in rows):
        figures = {row["figure"]: row for row in rows if row["against"] == peer}
        parts = [
            f"{verb} {row['better']:.2f}x as fast ({row['lowest']:.2f} to {row['highest']:.2f})"
            for name, verb in _COMPARED.items()
            if (row := figures.get(name)) is not None
        ]
        if "memory_bytes" in figures:
            parts.append(f"uses {100 / figures['memory_bytes']['better']:.0f}% of its memory")
        yield f"{peer}: this model {', '.join(parts)}"


def _quality(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "Not measured; --quality compares with the unoptimized model"
    change = 100 * (quality["perplexity_ratio"] - 1)
    error = 100 * quality["perplexity_ratio_error"]
    return (
        f"Same most likely next token as the unoptimized model in {quality['same_top_percent']:.1f}% of "
        f"{quality['tokens']:,} tokens; perplexity {change:+.2f}% (± {error:.2f})"
    )


def _cost(report: dict[str, Any], entry: dict[str, Any]) -> Iterator[str]:
    if "decode_tok_s" in entry["figures"]:
        cores = min(report["threads"], report["load"]["cores"])
        yield f"{rounded(entry['figures']['decode_tok_s']['p50'] / cores)} tokens/s per core"
    if report["memory_bytes"] is not None:
        yield f"{number(report['memory_bytes'], 'bytes')} of memory at peak, {_weights(report)} of it for the weights"
    if entry["joules_per_token"] is not None:
        yield f"{entry['joules_per_token']:.3f} J per generated token (measured by RAPL)"
    if (cost := entry["cost"]) is not None:
        yield cost_text(cost)


def _weights(report: dict[str, Any]) -> str:
    return number(sum(report["formats"].values()), "bytes")
