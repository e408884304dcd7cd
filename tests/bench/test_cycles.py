"""Loading, running and dropping a model, and running one from many threads: a few rounds, or all of them with `-m slow`."""

from __future__ import annotations

import pytest
from benchmarks import cycles


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return cycles.tiny(tmp_path_factory.mktemp("cycles"))


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_threads_get_the_same_tokens_as_alone(path, rounds):
    assert cycles.threads(path, 8, rounds) == []


def test_a_forked_child_generates(path):
    assert cycles.forked(path) == []


@pytest.mark.slow
def test_memory_is_flat_over_cycles(path):
    assert cycles.cycles(path, 200) == []


def test_different_tokens_and_growing_memory_are_failures(path, monkeypatch):
    kept, calls = [], iter(range(1000))
    monkeypatch.setattr(cycles, "generated", lambda model, seed: [next(calls), kept.append(bytearray(16 << 20))])
    monkeypatch.setattr(cycles.gc, "collect", lambda *_: kept[-1].__setitem__(slice(None, None, 4096), b"x" * 4096))
    actual = cycles.cycles(path, 18)
    assert sum("other tokens" in failure for failure in actual) == 15
    assert any("resident memory grew" in failure for failure in actual)
