"""Results as text: lines for the terminal, and tables in `PAGES` between `<!-- bench:NAME -->` and `<!-- /bench -->`.

python -m benchmarks.tables            writes them
python -m benchmarks.tables --check    exit code 1 where they are not what the results say
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.metrics import METRICS
from deepseek_optimizer.bench.sections import number

from . import measure_serving, results, training
from .deepseek import DEEPSEEK
from .families import FAMILIES
from .long_context import LONG
from .models import TITLES
from .serving import SERVING
from .speculation import SPECULATION
from .spine import SPINE
from .standing import STANDING, Bar, Row

_ROOT = Path(__file__).parents[1]
PAGES = tuple(_ROOT / page for page in ("README.md", "README.zh-CN.md", "docs/benchmarks.md", "docs/how-to/train.md"))
_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_SPINE_FIGURES = {"512 in": ("prefill_tok_s", "decode_tok_s", "memory_bytes")}  # of the others: the start alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if a.check and after != before:
            raise SystemExit(f"{page}: tables differ from benchmarks/results: run python -m benchmarks.tables")
        page.write_text(after, encoding="utf-8")


def filled(text: str, directory: Path = results.DIRECTORY) -> str:
    """The text with every table made anew."""

    def read(name: str) -> results.Entries:
        return results.read(name, directory)

    tables: dict[str, Callable[[results.Entries], Iterator[str]]] = {
        "summary": lambda _: summary_table(read("spine"), read("standing") | read("deepseek")),
        "summary_zh": lambda _: summary_table(read("spine"), read("standing") | read("deepseek"), "zh"),
        "spine": spine_table,
        "standing": standing_table,
        "deepseek": partial(standing_table, rows=DEEPSEEK),
        "families": partial(standing_table, rows=FAMILIES),
        "long": partial(standing_table, rows=LONG),
        "speculation": speculation_table,
        "serving": partial(serving_table, windows=read("window")),
        "training": training_table,
        "training_targets": lambda _: training_targets(read("training")),
    }

    def block(match: re.Match[str]) -> str:
        name = match[2]
        return match[1] + "\n".join(tables[name](read(name))) + "\n" + match[3]

    return _BLOCK.sub(block, text)


_SUMMARY = (  # rows of the READMEs: of every kind of work the rival that the standing set asks about, whatever the outcome
    "smol-decode", "smol-prefill", "r1q15-decode", "r1q15-decode-4096", "r1q15-prefill", "r1q15-prefill-4096", "smol-16",
    "r1q15-16", "v2lite-decode",
)  # fmt: skip
_SUMMARY_SPINE = ("decode_tok_s", "prefill_tok_s", "memory_bytes")
_SUMMARY_WORDS = {
    "en": ("workload", "other engine", "theirs", "ours", "ours / theirs (range of rounds)"),
    "zh": ("任务", "对比引擎", "对方", "本项目", "本项目 / 对方（各轮范围）"),
}


def summary_table(spine: results.Entries, standing: results.Entries, language: str = "en") -> Iterator[str]:
    """What a reader wants to know first: ratios to other engines, and to Transformers; without targets."""
    header = _SUMMARY_WORDS[language]
    yield _cells(*header)
    yield "|---" * len(header) + "|"
    for name, model in (("spine-smol", "SmolLM2"), ("spine-r1q15", "r1q15")):
        for row in spine[name]["rows"] if name in spine else ():
            if row["name"] == "int4" and row["figure"] in _SUMMARY_SPINE:
                kind = METRICS[row["figure"]]
                speeds = [number(row[side], kind.unit) for side in ("baseline", "side")]
                yield _cells(f"{model}, 512 in: {kind.label}", "Transformers bf16", *speeds, _bold(_fraction(row, kind.unit)))
    rows = {row.name: row for row in (*STANDING, *DEEPSEEK)}
    for name in _SUMMARY:
        if (entry := standing.get(name)) is None:
            continue
        for judged in entry["bars"]:
            theirs, ours = judged["against"], list(entry["sides"])[-1]
            yield _cells(rows[name].title, theirs, _speed(entry, theirs), _speed(entry, ours), _bold(_times(judged)))


def _fraction(row: dict[str, Any], unit: str) -> str:
    """Ours over theirs: of bytes, how much is left; else how many times as fast."""
    if unit != "bytes":
        return _times(row)
    return f"{1 / row['better']:.2f}x ({1 / row['highest']:.2f} - {1 / row['lowest']:.2f})"


def _bold(times: str) -> str:
    first, _, rest = times.partition(" ")
    return f"**{first}** {rest}"


def standing_table(entries: results.Entries, rows: Sequence[Row] = STANDING) -> Iterator[str]:
    yield from _machines(entries.values())
    read = "bytes per token, share of bandwidth"
    yield _cells("workload", "other engine", "its speed", "ours", "ratio (range)", "target", read, "verdict")
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        for place, bar in enumerate(row.bars):
            yield _cells(*_standing_cells(row, bar, entries.get(row.name), place))


def _standing_cells(row: Row, bar: Bar, entry: dict[str, Any] | None, place: int) -> list[str]:
    asked = _asked(bar.at_least, row.read_percent, bar.or_percent)
    if entry is None:
        return [row.title, " or ".join(rival.label for rival in bar.rivals), "", "", "", asked, "", "not measured"]
    judged, ours = entry["bars"][place], list(entry["sides"])[-1]
    theirs = judged["against"]
    read = [_read(entry["read"][name]) for name in (theirs, ours) if name in entry["read"]]
    figures = [_speed(entry, theirs), _speed(entry, ours), _times(judged)]
    return [row.title, theirs, *figures, asked, "; ".join(read), judged["verdict"]]


def _asked(at_least: float, read_percent: float | None, or_percent: float | None) -> str:
    both = [f"{word} {percent:.3g}% of bandwidth" for word, percent in (("and", read_percent), ("or", or_percent)) if percent]
    return " ".join([f"{at_least:.3g}x", *both])


def _speed(entry: dict[str, Any], label: str) -> str:
    return number(statistics.median(entry["sides"][label]), METRICS[entry["figure"]].unit)


def _times(ratio: dict[str, Any]) -> str:
    return f"{ratio['better']:.2f}x ({ratio['lowest']:.2f} - {ratio['highest']:.2f})"


def _read(share: dict[str, float]) -> str:
    return f"{number(share['token_bytes'], 'bytes')}, {share['percent']:.0f}%"


def training_table(entries: results.Entries) -> Iterator[str]:
    yield from _machines(entries.values())
    yield "| workload | configuration | time per step | peak memory of the process | evaluation loss after |"
    yield "|---|---|---|---|---|"
    for name in training.rows():
        for label, values in entries[name]["sides"].items() if name in entries else ():
            found = {figure: statistics.median(each) for figure, each in values.items()}
            loss = f"{found['eval_after']:.4f}" if "eval_after" in found else ""
            step, peak = f"{found['seconds']:.2f} s", f"{found['peak_bytes'] / training.GB:.2f} GB"
            yield _cells(entries[name]["title"], label, step, peak, loss)


def training_targets(entries: results.Entries) -> Iterator[str]:
    for name in training.rows():
        for bar in entries[name]["bars"] if name in entries else ():
            yield f"- {training.bar_text(bar)}: {bar['verdict']}"


def spine_table(entries: results.Entries) -> Iterator[str]:
    labels = list(dict.fromkeys(row["name"] for entry in entries.values() for row in entry["rows"]))
    yield from _machines(entries.values())
    yield _cells("", "Transformers bf16", *labels)
    yield "|---" * (len(labels) + 2) + "|"
    for comparison in SPINE:
        rows = entries[comparison.name]["rows"] if comparison.name in entries else []
        for figure in _SPINE_FIGURES.get(comparison.title, ("to_first_token_s",)):
            found = {row["name"]: row for row in rows if row["figure"] == figure}
            if found:
                unit = METRICS[figure].unit
                first = f"{TITLES[comparison.model]}, {comparison.title}: {METRICS[figure].label}"
                values = [
                    f"{number(found[label]['side'], unit)} ({found[label]['better']:.1f}x)" if label in found else ""
                    for label in labels
                ]
                yield _cells(first, number(next(iter(found.values()))["baseline"], unit), *values)


def speculation_table(entries: results.Entries) -> Iterator[str]:
    yield from _machines(entries.values())
    yield "| drafts | without | with | ratio (range) | target | tokens per round | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for row in SPECULATION:
        for side in entries[row.name]["rows"] if row.name in entries else []:
            asked = f"{side['at_least']:g}x" if side["at_least"] is not None else ""
            speeds = [number(side[name], "tok/s") for name in ("plain", "side")]
            first = f"{row.title}: {side['name']}"
            yield _cells(first, *speeds, _times(side), asked, f"{side['accepted_length']:.2f}", side["verdict"] or "")


def serving_table(entries: results.Entries, windows: results.Entries) -> Iterator[str]:
    """What serving claims, and below it the windows that conversations live in."""
    yield from _machines(entries.values())
    yield "SmolLM2-135M, in int4 unless stated otherwise. The clients run in a separate process on the server's cores."
    yield ""
    yield "| what | compared with | measured | ratio (range) | target | verdict |"
    yield "|---|---|---|---|---|---|"
    for row in SERVING:
        if row.name in entries:
            yield from (_cells(*cells) for cells in measure_serving.cells(entries[row.name]))
        else:
            yield _cells(row.title, "", "", "", "", "not measured")
    for window in windows.values():
        yield _cells(*_window_cells(window))


def _window_cells(window: dict[str, Any]) -> list[str]:
    """Late tokens of a text of many windows, beside a fresh window that holds the same text."""
    title = f"window: {window['title']}, {window['read']:,} read: perplexity, compared with a fresh window's"
    figures = [f"{window[name]:.2f}" for name in ("fresh_perplexity", "perplexity")]
    more = f"{window['perplexity_ratio']:.3f}x; {window['max_blocks']} of {window['window_blocks']} blocks"
    if "code_nats_pinned" in window:
        more += f"; a pinned string {window['code_nats_pinned']:.1f} nats per token, dropped {window['code_nats_dropped']:.1f}"
    return [title, *figures, more, "at most 1.05x, constant memory, pinned text remembered", window["verdict"]]


def _machines(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Where and when, once for all rows that agree."""
    seen = dict.fromkeys(
        f"{e['cpu']}, {e['threads']} threads, {e['date']}: {_rounds(e['rounds'])}, engines taking turns." for e in entries
    )
    if seen:
        yield from seen
        yield ""


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"medians of {count} rounds"


def _cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def bar_lines(entry: dict[str, Any]) -> list[str]:
    """A measured row of the standing set in the terminal."""
    lines = [f"{entry['title']}"]
    for label in entry["sides"]:
        read = (
            f"  reads {_read(entry['read'][label])} of {entry['read'][label]['machine_gb_s']:.1f} GB/s"
            if label in entry["read"]
            else ""
        )
        lines.append(f"  {label:28} {_speed(entry, label):>14}{read}")
    for bar in entry["bars"]:
        asked = _asked(bar["at_least"], bar["read_percent"], bar.get("or_percent"))
        lines.append(f"  {_times(bar)} of {bar['against']}, at least {asked}: {bar['verdict']}")
    return lines


def ratio_lines(entry: dict[str, Any]) -> list[str]:
    """A comparison with Transformers in the terminal."""
    return [entry["work"], *(_ratio_line(row) for row in entry["rows"])]


def _ratio_line(row: dict[str, Any]) -> str:
    baseline, side = (number(row[name], row["unit"]) for name in ("baseline", "side"))
    return f"  {row['name']:16} {METRICS[row['figure']].label:20} {baseline:>14} -> {side:>14} {_times(row)}"


if __name__ == "__main__":
    main()
