"""Comparison of two commits: with made-up figures, and once for real with both sides from this tree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "commits.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import commits  # noqa: E402

from support import warm_python  # noqa: E402


def test_ratios_are_per_round():
    actual = {"now": [{"a": 30.0}, {"a": 10.0}, {"a": 11.0}], "before": [{"a": 20.0}, {"a": 10.0}, {"a": 10.0}]}
    ((line, ratio),) = commits.compared("row", actual)
    assert ratio == 1.1
    assert "1.100x (1.000 - 1.500)" in line
    assert "10.0 ->       11.0" in line


def test_a_slower_tree_fails(monkeypatch, capsys):
    speeds = {"before": 100.0, "now": 97.0}
    monkeypatch.setattr(commits, "earlier", lambda commit: (Path("before"), {}))
    monkeypatch.setattr(commits, "measured", lambda name, turn, tree, env: {"f": speeds.get(str(tree), speeds["now"])})
    for bound, status in (("0.98", 1), ("0.96", 0)):
        monkeypatch.setattr(sys, "argv", ["commits", "HEAD", "row", "--rounds", "2", "--at-least", bound])
        with pytest.raises(SystemExit) as ended:
            commits.main()
        assert ended.value.code == status
    assert "0.970x" in capsys.readouterr().out


def test_unknown_rows_are_errors():
    code = f"import runpy; runpy.run_path({str(ROOT / 'benchmarks' / 'commits_side.py')!r}, run_name='__main__')"
    done = warm_python.run(code, ROOT, "no-such-row", "0", "1")
    assert done.returncode == 1
    assert "no row is called no-such-row; known: smol-decode" in done.stderr
