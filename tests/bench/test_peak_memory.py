"""The demo's memory column: the peak above the initial resident size, including mapped pages."""

from __future__ import annotations

import sys

import pytest

from support import warm_python

PROBE = """
import mmap, tempfile
from deepseek_optimizer.bench.peak_memory import PeakMemory
spike = bytearray(200 << 20); del spike  # before the count starts: must not show
memory = PeakMemory()
block = bytearray(64 << 20); del block   # freed again: the peak keeps it
file = tempfile.TemporaryFile(); file.write(bytes(32 << 20)); file.flush()
mapped = mmap.mmap(file.fileno(), 32 << 20, access=mmap.ACCESS_READ)
sum(mapped[i] for i in range(0, 32 << 20, 4096))
held = bytearray(64 << 20)
print(memory.bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_peak_memory_counts_later_allocations():
    done = warm_python.run(PROBE)
    assert done.returncode == 0, done.stderr
    assert 96 << 20 <= int(done.stdout) <= 120 << 20


AGAIN = """
from deepseek_optimizer.bench.peak_memory import PeakMemory
memory = PeakMemory()
held = bytearray(64 << 20)
spike = bytearray(200 << 20); del spike
memory.restart()
print(memory.bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_restarted_peak_counts_live_allocations():
    done = warm_python.run(AGAIN)
    assert done.returncode == 0, done.stderr
    assert 60 << 20 <= int(done.stdout) <= 90 << 20
