"""CPU use by other processes, from scripted clocks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepseek_optimizer.bench.background import BackgroundLoad, CpuTimes, cpu_times, used_by_others


def _load(monkeypatch, *clocks, cores=2, average=0.0):
    """clocks: (wall, all CPU, own CPU) at the start, after the first sample, and at the end."""
    monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0), raising=False)
    readings = (CpuTimes(*clock) for clock in clocks)
    return BackgroundLoad(cores, lambda: next(readings), sample_s=0)


def test_own_cpu_time_does_not_count(monkeypatch):
    load = _load(monkeypatch, (0, 100, 50), (1, 100, 50), (11, 120, 69.5))
    assert load.report() == {
        "cores": 2,
        "load_average": 0.0,
        "others_before": 0,
        "others_during": pytest.approx(0.05),
        "busy": [],
    }


def test_other_processes_during_the_measurement(monkeypatch):
    load = _load(monkeypatch, (0, 0, 0), (1, 0.1, 0), (11, 20.1, 10))
    assert load.busy_before() == []
    assert load.report()["busy"] == ["other processes used 1.0 of 2 cores during the measurement"]


def test_other_processes_before_the_measurement(monkeypatch):
    load = _load(monkeypatch, (0, 0, 0), (1, 1.5, 0), (11, 11.5, 10))
    assert load.busy_before() == ["other processes used 1.5 of 2 cores before the measurement"] == load.report()["busy"]


def test_a_high_load_average(monkeypatch):
    (reason,) = _load(monkeypatch, (0, 0, 0), (1, 0, 0), average=3.25).busy_before()
    assert "load average was 3.2 on 2 cores" in reason


def test_small_load_on_a_large_machine_is_accepted(monkeypatch):
    clocks = (0, 0, 0), (1, 2.0, 0)
    assert _load(monkeypatch, *clocks, cores=64).busy_before() == []
    assert _load(monkeypatch, *clocks, cores=16).busy_before()


def test_systems_without_load_information(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    load = BackgroundLoad(2, lambda: None, sample_s=0).report()
    assert load["others_before"] is None and load["others_during"] is None and load["busy"] == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_own_cpu_time_includes_children():
    before = cpu_times()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    after = cpu_times()
    assert after.own - before.own >= 0.19 and after.busy - before.busy >= 0.15
    assert used_by_others(before, before._replace(wall=before.wall + 1)) == 0
