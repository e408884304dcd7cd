"""What a report of long texts shows, in the terminal and on the page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from deepseek_optimizer.bench.long.report import page, plot, sections
from deepseek_optimizer.bench.svg import panels
from deepseek_optimizer.bench.table import show_sections


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
        "schema": 1, "model": "m <b>", "cpu": "A CPU", "versions": {"torch": "2"}, "config": {"precision": "int4"},
        "tasks": ["single", "qa"], "samples": 3, "seed": 0, "sides": {"flash": side, "sparse": {}}, "rows": rows,
    }  # fmt: skip


def test_the_table_has_modes_side_by_side_and_reasons(found):
    text = io.StringIO()
    show_sections(Console(file=text, width=80), sections(found))
    shown = text.getvalue()
    rows = re.findall(r"│ (\d,\d+ \w+) +│ +([^│]*?) │", shown)
    assert rows[:4] == [("4,096 flash", "100%"), ("4,096 sparse", "75%"), ("8,192 flash", "-"), ("8,192 sparse", "50%")]
    assert [name for name, _ in rows[4:]] == ["4,096 flash", "4,096 sparse", "8,192 sparse"]
    for part in ("2,000", "31.25", "64 MB", "8,192 flash: killed by <signal> 9", "not to be had", "A CPU, 2 threads", "int4"):
        assert part in shown, part


def test_the_page_has_one_plot_and_no_markup_of_others(found):
    text = page(found)
    assert text.count("<svg") == 1 and "m <b>" not in text and "<signal>" not in text and "m &lt;b&gt;" in text


def test_the_plot_has_a_line_a_mode_in_each_panel(found):
    svg = ElementTree.fromstring(plot(found))
    lines = [e for e in svg.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 5 * 2
    assert [len(e.get("points").split()) for e in lines] == [1, 2] * 4 + [1, 1]  # two memories are not known
    assert len({e.get("stroke") for e in lines}) == 2


def test_panels_place_lengths_by_doublings():
    svg = ElementTree.fromstring(panels("t", {"f": {"a": [(1024, 1.0), (4096, 4.0), (65536, 2.0)]}}, "x"))
    (line,) = (e for e in svg.iter() if e.tag.endswith("polyline"))
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    (x0, low), (x1, high), (x2, middle) = points
    assert (x1 - x0) * 2 == pytest.approx(x2 - x1) and (middle - high) * 1.5 == pytest.approx(low - high)
    assert {e.text for e in svg.iter() if e.text} >= {"1K", "4K", "64K"}
