"""Speculative decoding benchmarks: ratios and verdicts from the output of a round's processes; one small model for real."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "speculation.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import drafts, models, run, speculation  # noqa: E402
from benchmarks.deepseek import DEEPSEEK  # noqa: E402
from benchmarks.speculation import SPECULATION, TRAINED, Speculation  # noqa: E402
from benchmarks.spine import SPINE  # noqa: E402
from benchmarks.standing import STANDING  # noqa: E402
from benchmarks.verdict import MISSED, REACHED  # noqa: E402

from deepseek_optimizer.bench.work import Work  # noqa: E402

ROW = Speculation("row", "A row", "smol", "int4", Work(8, 9), ("--agree", "0.8", "0"), {"80% hold": 2.0, "0% hold": 0.97})
REPORT = {
    "accepted_length": 2.5,
    "acceptance": [0.8, None],
    "rounds": 9,
    "drafted": 7,
    "own_estimate": [2.0],
    "chosen": [[3, 9]],
}


def test_the_rows_are_well_formed():
    names = [row.name for row in (*STANDING, *DEEPSEEK, *SPINE, *SPECULATION)]
    assert len(set(names)) == len(names)
    assert all(row.model in (*models.TITLES, TRAINED) for row in SPECULATION)
    assert all(row.quick().work.prompt <= 32 and row.quick().work.new <= 12 for row in SPECULATION)


def test_ratios_are_between_adjacent_runs(monkeypatch):
    rounds = iter([([10, 20], [25, 40], [9, 19.9]), ([10, 10], [21, 30], [9.5, 9.8])])

    def printed(command):
        assert command[:3] == [sys.executable, "-m", "benchmarks.drafts"]
        plain, often, never = next(rounds)
        return {
            "plain": {"decode_tok_s": plain},
            "80% hold": {"decode_tok_s": often, **REPORT},
            "0% hold": {"decode_tok_s": never, **REPORT},
        }

    monkeypatch.setattr(speculation, "run_json", printed)
    monkeypatch.setattr(speculation, "model", lambda name, form: Path(name))
    actual = speculation.measure(ROW, threads=1, rounds=2, note=lambda text: None)
    often, never = actual["rows"]
    assert (often["lowest"], often["better"], often["highest"], often["verdict"]) == (2.0, 2.3, 3.0, REACHED)
    assert (never["better"], never["verdict"]) == (pytest.approx(0.965), MISSED)
    first, second, third = speculation.lines(actual)
    assert first == "A row"
    assert "2.30x (2.00 - 3.00), at least 2x: reached" in second and "hold: 80%, -" in second
    assert "missed" in third


def test_unknown_names_are_errors(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "spec-nothing"])
    with pytest.raises(SystemExit):
        run.main()
    assert "spec-r1q15" in capsys.readouterr().err


def test_one_small_model_for_real(tiny_model):
    a = argparse.Namespace(
        model=tiny_model,
        agree=[1.0, 0.0],
        mtp=[],
        least=[],
        texts=None,
        dialogues=None,
        prompt=12,
        new=24,
        threads=1,
        repeats=2,
        warmup=0,
    )
    actual = drafts.measure(a)
    assert list(actual) == ["plain", "100% hold", "0% hold"]
    assert all(len(side["decode_tok_s"]) == 2 for side in actual.values())
    assert actual["0% hold"]["accepted_length"] == 1.0
    assert actual["100% hold"]["rounds"] <= 46
