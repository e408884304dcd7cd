"""The rows of `make bench-train`: well formed, correctly judged, and one side for real on a tiny model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "training.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import training, training_side  # noqa: E402
from benchmarks.tables import training_table, training_targets  # noqa: E402
from benchmarks.verdict import MISSED, REACHED  # noqa: E402

from support.tiny_v3 import tiny_v3  # noqa: E402


def test_the_rows_are_well_formed() -> None:
    for row in training.rows().values():
        labels = [side.label for side in row.sides]
        assert len(set(labels)) == len(labels)
        for bar in row.bars:
            assert bar.side in labels and (bar.against is None or bar.against in labels)
            assert bar.figure in ("seconds", "peak_bytes", "eval_after")


@pytest.mark.parametrize(
    ("figure", "limit", "against", "ours", "verdict"),
    [
        ("seconds", 1 / 2.8, "theirs", [3.5, 3.6], REACHED),
        ("seconds", 1 / 2.8, "theirs", [3.6, 3.7], MISSED),
        ("peak_bytes", 4e9, None, [3.9e9], REACHED),
        ("peak_bytes", 4e9, None, [4.1e9], MISSED),
        ("eval_after", 0.003, "theirs", [9.96, 9.98], REACHED),
        ("eval_after", 0.003, "theirs", [9.96, 9.96], MISSED),  # lower, but not the same
        ("eval_after", 0.003, "theirs", [10.04, 10.04], MISSED),
    ],
)
def test_bars(figure, limit, against, ours, verdict) -> None:
    actual = {"ours": {figure: ours}, "theirs": {figure: [10.0] * len(ours)}}
    judged = training.judged(training.Bar(figure, "ours", limit, against), actual)
    assert judged["verdict"] == verdict
    assert training.bar_text(judged).startswith("ours: ")


def test_the_first_step_does_not_count() -> None:
    actual = training.figures({"seconds": [9.0, 1.0, 2.0, 3.0], "peak_bytes": 5})
    assert actual == {"seconds": 2.0, "peak_bytes": 5}


def test_rows_of_text() -> None:
    rows = training_side.texts(tiny_v3(), 5, 32)
    assert len(rows) == 5 and all(len(row["input_ids"]) == 32 and row["labels"] == row["input_ids"] for row in rows)
    assert AutoTokenizer.from_pretrained(tiny_v3()).decode(rows[0]["input_ids"]).strip()


@pytest.mark.parametrize("side", ["fp32", "ours"])
def test_a_side_for_real(side: str) -> None:
    a = argparse.Namespace(
        side=side, model=tiny_v3(), rows=2, tokens=32, steps=3, evaluate=2, rate=1e-3, lora=0, precision=None, threads=1,
        fields={},
    )  # fmt: skip
    actual = training_side.run(a)
    assert len(actual["seconds"]) == len(actual["losses"]) == 3 and actual["peak_bytes"] > 1e8
    assert actual["eval_after"] != actual["eval_before"] and 1 < actual["eval_before"] < 20
    assert ("report" in actual) == (side == "ours")


def test_table_of_results() -> None:
    row = training.rows()["lora"]
    sides = {side.label: {"seconds": [1.0, 3.0], "peak_bytes": [1e9, 1e9]} for side in row.sides}
    bars = [training.judged(bar, sides) for bar in row.bars]
    entry = {"title": "a model", "sides": sides, "bars": bars, "cpu": "a CPU", "threads": 2, "date": "2026-01-01", "rounds": 2}
    text = "\n".join(training_table({"lora": entry}))
    assert "| a model | ours, LoRA, recompute | 2.00 s | 1.00 GB |" in text and "reached" not in text
    assert "at most 1.5 GB: reached" in "\n".join(training_targets({"lora": entry}))
