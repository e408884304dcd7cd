"""The check that a batch job survives kills: it must notice what is missing, doubled or different."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "batch_kills.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks.batch_kills import _compare, _lines, _requests  # noqa: E402

from deepseek_optimizer.batch.requests import read_requests  # noqa: E402


@pytest.fixture
def files(tmp_path):
    source, whole, killed = (tmp_path / name for name in ("in", "whole", "killed"))
    source.write_text("".join(json.dumps(line) + "\n" for line in _requests(20, random.Random(1))))
    answers = [{"custom_id": f"request {n}", "response": {"status_code": 200}} for n in range(20)]
    for file in (whole, killed):
        file.write_text("".join(json.dumps(line) + "\n" for line in answers))
    return source, whole, killed


def test_requests_are_valid(files):
    assert len(read_requests(files[0]).requests) == 20


def test_equal_outputs(files):
    found = _compare(*files)
    assert found["same_bytes"] and found["each_once"] and found["errors"] == 0


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, lines[0]], lambda lines: lines[::-1]])
def test_missing_doubled_and_misplaced_answers(files, change):
    lines = files[2].read_text().splitlines()
    files[2].write_text("".join(line + "\n" for line in change(lines)))
    found = _compare(*files)
    assert not found["same_bytes"] and not found["each_once"]


def test_other_bytes(files):
    files[2].write_text(files[2].read_text().replace("200", "500", 1))
    found = _compare(*files)
    assert not found["same_bytes"] and found["each_once"] and found["errors"] == 1


def test_answers_in_a_partial_file(tmp_path):
    file = tmp_path / "out.partial"
    assert _lines(file) == 0
    file.write_text('{"job": {}}\n{"index": 1}\n{"ind')
    assert _lines(file) == 1
