"""Two servers compared batch by batch, with made-up speeds; the sides themselves are tested in test_serving.py."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "serving_batches.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import serving_batches  # noqa: E402


def test_sides_take_turns_and_the_first_batch_is_not_counted():
    order = []

    def side(label, speeds):
        def batch(seed):
            order.append((label, seed))
            return speeds[seed]

        return batch

    ratios = serving_batches.in_turns(side("ours", (1, 90, 80)), side("theirs", (7, 100, 160)), 2)
    assert ratios == [0.9, 0.5]
    assert order == [(label, seed) for seed, pair in enumerate(("to", "ot", "to")) for label in _labels(pair)]


def _labels(pair):
    return ({"o": "ours", "t": "theirs"}[letter] for letter in pair)


@pytest.mark.parametrize("least, status", [("0.85", 0), ("0.95", 1)])
def test_a_median_below_the_bound_fails(monkeypatch, capsys, least, status):
    @contextmanager
    def side(speed):
        yield lambda seed: speed

    monkeypatch.setattr(serving_batches, "_server", lambda: side(90.0))
    monkeypatch.setattr(serving_batches, "_engine", lambda: side(100.0))
    monkeypatch.setattr(sys, "argv", ["serving_batches", "engine", "--starts", "2", "--batches", "2", "--at-least", least])
    with pytest.raises(SystemExit) as ended:
        serving_batches.main()
    assert ended.value.code == status
    assert "median 0.900x (0.900 - 0.900)" in capsys.readouterr().out
