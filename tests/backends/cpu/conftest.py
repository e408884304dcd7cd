"""Native backend tests run on each ISA variant that this host supports; without a native build they are skipped."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.cpu import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        names = [] if cpu.unavailable_reason() else [n for n in native.isa_names() if native.isa_runs_here(n)]
        metafunc.parametrize("isa", names or [pytest.param("", marks=pytest.mark.skip(cpu.unavailable_reason() or "no ISA"))])


@pytest.fixture
def backend(isa: str) -> cpu.CpuBackend:
    """The native backend with one ISA variant and two threads."""
    made = cpu.CpuBackend(isa=cpu.exact(isa), threads=2)
    assert made.isa == isa  # the forced variant is the one that runs
    return made
