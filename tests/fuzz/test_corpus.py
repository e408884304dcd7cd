"""Replays the fuzzers' corpora without atheris: fixed bugs must stay fixed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CORPUS = sorted(path for path in (HERE / "corpus").glob("*/*"))
HANGS = 60  # seconds; an input takes milliseconds


@pytest.fixture(scope="module")
def targets() -> Any:
    sys.path.insert(0, str(HERE))
    try:
        import targets
    finally:
        sys.path.remove(str(HERE))
    return targets.TARGETS


def hangs(*_: Any) -> None:
    raise TimeoutError(f"more than {HANGS} seconds")


@pytest.mark.parametrize("name", sorted({path.parent.name for path in CORPUS}))
def test_every_input_is_accepted_or_a_typed_error(targets, name: str) -> None:
    inputs = [path for path in CORPUS if path.parent.name == name]
    before = signal.signal(signal.SIGALRM, hangs)
    try:
        for path in inputs:
            signal.alarm(HANGS)
            targets[name](path.read_bytes())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert sum(path.stat().st_size for path in inputs) < 64 << 10, "a corpus in the repository must be small"


def test_every_target_has_accepted_inputs_in_its_corpus(targets) -> None:
    """A corpus of only rejected inputs would reach only the first check."""
    assert {path.parent.name for path in CORPUS} == targets.keys()
    for name, target in targets.items():
        read = 0
        for path in CORPUS:
            if path.parent.name == name:
                try:
                    target.run(path.read_bytes())
                    read += 1
                except target.errors:
                    pass
        assert read, name
