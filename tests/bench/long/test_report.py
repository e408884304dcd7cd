"""The report on long texts, in the terminal and as an HTML page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from deepseek_optimizer.bench.charts import panels
from deepseek_optimizer.bench.long.report import page, plot, sections
from deepseek_optimizer.bench.terminal import show_sections

SVG = "{http://www.w3.org/2000/svg}"


def _row(mode, length, mean, **fields):
    return {
        "mode": mode, "length": length, "error": None, "scores": {}, "accuracy": {"single": mean, "qa": mean}, "mean": mean,
        "ttft_s": 1.5, "prefill_tok_s": 2000.0, "decode_tok_s": 31.25, "memory_bytes": 64_000_000, **fields,
    }  # fmt: skip


@pytest.fixture
def found():
    side = {"backend": "cpu (avx512)", "threads": 2, "load_s": 1.0}
    rows = [
        _row("flash", 4096, 1.0),
        {"mode": "flash", "length": 8192, "error": "killed by <signal> 9"},
        _row("sparse", 4096, 0.75, memory_bytes=None),
        _row("sparse", 8192, 0.5, ttft_s=2.5),
    ]
    return {
        "schema": 1, "date": "2026-11-27T15:04:05+00:00", "seconds": 95.0, "machine_memory_bytes": 24 << 30,
        "load": {"cores": 2, "load_average": 0.25, "others_before": 0.0, "others_during": 0.1, "busy": []},
        "model": "m <b>", "cpu": "A CPU", "versions": {"torch": "2"}, "config": {"precision": "int4"},
        "tasks": ["single", "qa"], "samples": 3, "seed": 0, "sides": {"flash": side, "sparse": {}}, "rows": rows,
    }  # fmt: skip


def test_table_compares_modes_and_gives_reasons(found):
    text = io.StringIO()
    show_sections(Console(file=text, width=120), sections(found))
    shown = text.getvalue()
    rows = re.findall(r"│ (\d,\d+ \w+) +│ +([^│]*?) │", shown)
    assert rows[:4] == [("4,096 flash", "100%"), ("4,096 sparse", "75%"), ("8,192 flash", "-"), ("8,192 sparse", "50%")]
    assert [name for name, _ in rows[4:]] == ["4,096 flash", "4,096 sparse", "8,192 sparse"]
    reason = "8,192 flash: killed by <signal> 9"
    for part in ("2,000", "31.25", "64 MB", reason, "not available", "A CPU, 24.0 GiB", "2 threads", "int4"):
        assert part in shown, part


def test_page_has_one_plot_and_escapes_markup(found):
    text = page(found)
    assert text.count("<svg") == 1 and "m <b>" not in text and "<signal>" not in text and "m &lt;b&gt;" in text


def test_plot_has_a_line_per_mode_in_each_panel(found):
    root = ElementTree.fromstring(plot(found).svg)
    lines = _lines(root)
    assert len(lines) == 5 * 2
    assert [len(points) for _, points in lines] == [1, 2] * 4 + [1, 1]  # two memory values are unknown
    assert len({color for color, _ in lines}) == 2
    assert "accuracy, %, sparse: 75 at 4K, 50 at 8K" in root[1].text


def test_panels_have_a_logarithmic_length_axis():
    root = ElementTree.fromstring(panels("t", {"f": {"a": [(1024, 1.0), (4096, 4.0), (65536, 2.0)]}}, "x").svg)
    ((_, points),) = _lines(root)
    (x0, low), (x1, high), (x2, middle) = points
    assert (x1 - x0) * 2 == pytest.approx(x2 - x1) and (middle - high) * 1.5 == pytest.approx(low - high)
    assert {text.text for text in root.iter(f"{SVG}text")} >= {"1K", "4K", "64K"}


def _lines(root):
    """(color, points) of each line of a panel, without the legend's."""
    found = []
    for group in root.iter(f"{SVG}g"):
        name = group.get("id", "")
        if "line2d" not in name:
            continue
        for path in group.findall(f"{SVG}path"):
            color = re.search(r"stroke: (#\w+)", path.get("style", ""))
            if color and path.get("clip-path"):
                found.append(
                    (color[1], [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))])
                )
    return found
