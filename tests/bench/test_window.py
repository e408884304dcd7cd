"""The benchmark of the sliding window: well formed, and measured for real on the small trained model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "window.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks.verdict import REACHED  # noqa: E402
from benchmarks.window import MAX_RATIO, READINGS, Bench, measure  # noqa: E402

from support.tiny_v3 import tiny_v3  # noqa: E402

SMALL = replace(READINGS[0], window=256)


def test_the_rows_are_well_formed() -> None:
    assert len({row.name for row in READINGS}) == len(READINGS)
    assert all(row.model in ("smol", "tiny-v3") and row.late < 10 for row in READINGS)


def test_a_small_window_for_real() -> None:
    row = measure(SMALL, tiny_v3(), quick=True)
    assert row["verdict"] == REACHED
    assert row["read"] == 768 and row["compared"] == 255 and row["drops"] >= 2
    assert row["max_blocks"] == row["window_blocks"] == 8
    assert 1 - 0.05 < row["perplexity_ratio"] <= MAX_RATIO and 10 < row["perplexity"] < 60


def test_unrotated_keys_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure detects faults: the same measurement with a store that does not rotate keys."""
    path = tiny_v3()
    bench = Bench(SMALL, path, quick=True)
    right = bench.compare(1)
    monkeypatch.setattr(type(bench.arena.store), "rotate", lambda *_: None)
    wrong = bench.compare(1)
    assert abs(right["perplexity_ratio"] - 1) < abs(wrong["perplexity_ratio"] - 1) / 2
