"""On which CPUs a thread runs."""

from __future__ import annotations

import os
import threading

import pytest

from deepseek_optimizer.system.affinity import OnCpus

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no threads")


def test_a_thread_and_those_that_it_starts_are_bound():
    before, inside = os.sched_getaffinity(0), []
    one = min(before)
    with OnCpus([one]):
        inside.append(os.sched_getaffinity(0))
        thread = threading.Thread(target=lambda: inside.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert inside == [{one}, {one}] and os.sched_getaffinity(0) == before


def test_other_threads_are_not():
    before, seen, bound, looked = os.sched_getaffinity(0), [], threading.Event(), threading.Event()

    def look() -> None:
        bound.wait(10)
        seen.append(os.sched_getaffinity(0))
        looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    with OnCpus([min(before)]):
        bound.set()
        assert looked.wait(10)
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("cpus", [None, [4095], []])
def test_cpus_that_it_may_not_use_change_nothing(cpus):
    before = os.sched_getaffinity(0)
    with OnCpus(cpus):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before
