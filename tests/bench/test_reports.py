"""Comparison with a baseline, and the reports as text and HTML."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from deepseek_optimizer.bench import baseline
from deepseek_optimizer.bench.charts import Bar, bars
from deepseek_optimizer.bench.html import check_target, page, write
from deepseek_optimizer.bench.metrics import figures
from deepseek_optimizer.bench.terminal import show
from deepseek_optimizer.errors import ConfigError, MissingPackageError

SVG = "{http://www.w3.org/2000/svg}"

WORK = {"prompt": 64, "new": 8, "depth": 0, "batch": 1}
RATIO = {
    "figure": "decode_tok_s",
    "unit": "tok/s",
    "baseline": 10.0,
    "side": 25.0,
    "better": 2.5,
    "lowest": 2.25,
    "highest": 3.0,
}
QUALITY = {
    "text": "Python's documentation", "tokens": 128, "kl_mean": 0.25, "kl_median": 0.125, "kl_999": 2.0,
    "same_top_percent": 75.0, "perplexity": 30.0, "reference_perplexity": 20.0, "perplexity_ratio": 1.5,
    "perplexity_ratio_error": 0.0625,
}  # fmt: skip


@pytest.fixture
def full(report):
    """A report with every section."""
    result = report(
        quality=dict(QUALITY),
        pairs={"pairs": 2, "bleu": 31.5, "bleu_signature": "b", "chrf": 52.5, "chrf_signature": "c"},
        ablation=[{"variant": name, "work": WORK, **RATIO} for name in ("all rules", "without qkv")],
        against=[{"against": "llama.cpp", "name": "ours", "work": WORK, **RATIO}],
    )
    result["works"][0].update(
        limits={
            "token_bytes": 77e6, "read_gb_s": 16.5, "bandwidth_percent": 55.0, "machine_read_gb_s": 30.0,
            "prefill_tera": 0.276, "matrix_percent": 51.0, "matrix_percent_of": "torch's int8 product",
        },
        watts=12.5, joules_per_token=0.125, cost={"in": 0.1, "out": 0.566, "blended": 0.25},
    )  # fmt: skip
    result["baseline"] = baseline.compare(result, report(decode=[50.0, 50.0, 50.0]))
    return result


def test_slower_beyond_noise_is_a_regression(report):
    now = report(decode=[90.0, 91.0, 89.0])
    rows = {row["figure"]: row for row in baseline.compare(now, report())}
    assert rows["decode_tok_s"]["regressed"] and rows["decode_tok_s"]["change_percent"] == pytest.approx(10)
    assert not any(row["regressed"] for name, row in rows.items() if name != "decode_tok_s")
    assert not any(row["regressed"] for row in baseline.compare(report(), now))


def test_scatter_is_not_a_regression(report):
    now, old = report(decode=[60.0, 90.0, 120.0]), report(decode=[70.0, 100.0, 130.0])
    assert not any(row["regressed"] for row in baseline.compare(now, old))
    now, old = report(decode=[96.0, 96.0, 96.0]), report(decode=[100.0, 100.0, 100.0])
    assert not any(row["regressed"] for row in baseline.compare(now, old))
    assert any(row["regressed"] for row in baseline.compare(now, old, tolerance=0.01))


def test_times_memory_and_quality_regress_upwards(report):
    now = report(memory_bytes=2 * 10**8, quality={**QUALITY, "kl_mean": 0.5})
    now["works"][0]["figures"]["ttft_ms"].update(p50=80.0, samples=[80.0, 80.0, 80.0])
    rows = baseline.compare(now, report(quality=QUALITY))
    assert {row["figure"] for row in rows if row["regressed"]} == {"ttft_ms", "memory_bytes", "kl_mean"}


@pytest.mark.parametrize("name, value", [("model", "another"), ("cpu", "x"), ("threads", 1), ("config", {}), ("schema", 99)])
def test_incomparable_reports_are_errors(report, name, value):
    with pytest.raises(ConfigError, match=f"another {name}"):
        baseline.compare(report(), report(**{name: value}))


def test_no_common_workload(report):
    other = report()
    other["works"][0]["work"] = {**WORK, "prompt": 65}
    with pytest.raises(ConfigError, match="no run with the same --prompt"):
        baseline.compare(report(), other)


def test_reading_a_baseline(report, tmp_path):
    file = tmp_path / "b"
    for text in (json.dumps(report(), indent=1), "a table\n" + json.dumps(report()) + "\n"):
        file.write_text(text)
        assert baseline.read(file) == report()
    for text in ("", "[]", "{}", "no json", json.dumps({"works": None, "schema": 1})):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not a report"):
            baseline.read(file)


def _shown(report):
    text = io.StringIO()
    show(Console(file=text, width=200), report)
    return text.getvalue()


def test_the_table_shows_every_section(full):
    text = _shown(full)
    for expected in (
        "76 MB", "64 in, 8 out, batch 1", "16.5 GB/s, 55% of the 30.0", "12.5 W",
        "cost 0.100 in, 0.566 out, 0.250 blended", "0.25000", "75.00%",
        "1.5000 +- 0.0625", "31.5", "without qkv", "25.0 (2.50x)", "2.50x (2.25 - 3.00)", "Compared with the baseline",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_summary_comes_first_and_is_complete(full):
    full["peers"] = {"llama-cpp-python": "0.3.36"}
    first = _shown(full).split("64 in, 8 out, batch 1")[0]
    for expected in (
        "100 tokens/s generated for one request", "first token of a 64-token prompt after 50.0 ms (medians of 3 runs)",
        "llama.cpp: this model generates 2.50x as fast (2.25 to 3.00)", "75.0% of 128 tokens", "perplexity +50.00% (± 6.25)",
        "50.0 tokens/s per core", "100 MB of memory at peak, 76 MB of it for the weights", "0.125 J per generated token",
        "0.566 out", "A CPU, 2 of 2 cores used, 24.0 GiB", "2026-11-27 15:04 UTC, took 1 min 35 s",
        "0.0 cores before and 0.1 during", "llama-cpp-python 0.3.36",
    ):  # fmt: skip
        assert expected in first, expected


def test_the_summary_lists_unmeasured_values(report):
    first = _shown(report()).split("64 in, 8 out, batch 1")[0]
    assert "Nothing else; --against" in first and "Not measured; --quality" in first and "J per" not in first


def test_a_busy_machine_is_a_warning(report):
    busy = report()
    assert "WARNING" not in _shown(busy) and 'class="warning"' not in page(busy)
    busy["load"]["busy"] = ["other processes used 1.3 of 2 cores during the measurement"]
    assert "WARNING: The machine was busy" in _shown(busy) and "1.3 of 2 cores during" in _shown(busy)
    assert page(busy).count('class="warning"') == 1 and "unreliable: other processes used 1.3" in page(busy)


def test_percentiles_need_enough_samples(report):
    few = report()
    assert "p95" not in _shown(few) and "p99" not in _shown(few)
    few["works"][0]["figures"] |= figures({"itl_ms": [float(v) for v in range(1, 31)]})
    lines = [line.replace("│", " ").split() for line in _shown(few).splitlines()]
    assert next(line for line in lines if line[:2] == ["between", "tokens,"])[3:] == ["15.50", "1.00", "30.00", "28.55", "30"]
    assert next(line for line in lines if line[:2] == ["decode,", "tok/s"])[2:] == ["100.0", "99.00", "101.0", "-", "3"]
    assert "p99" not in _shown(few)


def test_markup_in_names_is_escaped(report):
    name = "[bold]x[/] <script>alert(1)</script>"
    assert name in _shown(report(model=name))
    assert "<script>" not in page(report(model=name))


class _Page(HTMLParser):
    """Checks that elements are nested correctly, and collects tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.links = [], [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def test_the_page_is_self_contained(full):
    text = page(full)
    actual = _Page(text)
    assert not actual.links and not {"script", "link", "img"} & set(actual.tags)
    assert "@import" not in text and text.count("url(") == text.count("url(#")
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert actual.tags.count("svg") == 5  # peers, decode, prefill, gaps, one batch of the ablation


def test_charts_have_unique_ids_and_use_the_page_color(full):
    text = page(full)
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(chart)
        title, desc = root[0], root[1]
        assert root.get("aria-labelledby").split() == [title.get("id"), desc.get("id")] and root.get("role") == "img"
        assert title.text and desc.text and "currentColor" in chart and "#010203" not in chart
        assert set(re.findall(r'href="#([^"]+)"', chart)) <= set(names)


def test_the_page_contains_the_report(full):
    from html import unescape

    text = page(full)
    assert json.loads(unescape(text[text.index("<pre>") + 5 : text.index("</pre>")])) == full


def test_a_page_of_a_small_report(report):
    small = copy.deepcopy(report())
    del small["works"][0]["figures"]["itl_ms"], small["works"][0]["figures"]["decode_tok_s"]
    assert _Page(page(small)).tags.count("svg") == 1


def test_bars_are_to_scale_and_described():
    chart = bars("t <b>", [Bar("a", 10, 8, 20, "ten"), Bar("b", 5, 5, 5, "five")], "tok/s", mark=10)
    root = ElementTree.fromstring(chart.svg)
    widths = [_width(path) for path in root.iter(f"{SVG}path") if "fill: #2f7de1" in path.get("style", "")]
    assert len(widths) == 2 and widths[0] == pytest.approx(2 * widths[1])
    assert (root[0].text, root[1].text) == ("t <b>", "a: ten; b: five")
    assert {"a", "b", "ten", "five", "tok/s"} <= {text.text for text in root.iter(f"{SVG}text")}


def _width(path):
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d"))]
    return max(xs) - min(xs)


def test_charts_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'matplotlib.*"deepseek-optimizer\[bench\]"'):
        check_target(tmp_path / "r.html")


def test_a_page_cannot_replace_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        check_target(tmp_path)


def test_a_page_is_written_atomically(tmp_path, monkeypatch):
    file = tmp_path / "r.html"
    write(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["r.html"]
