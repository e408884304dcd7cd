"""The store that only the processes of one attempt use."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from deepseek_optimizer.system.attempt_store import store_of_attempt

RANKS = 4


@pytest.fixture
def connect():
    """Connects to a store that outlives the processes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))


def attempt(connect, number: int) -> None:
    """Processes write their addresses, as process groups do, and read those of all."""

    def run(rank: int) -> list[bytes]:
        store = store_of_attempt(connect(), rank, RANKS, 30)
        store.set(str(rank), f"{number}.{rank}")
        return [store.get(str(other)) for other in range(RANKS)]

    with ThreadPoolExecutor(RANKS) as pool:
        for read in pool.map(run, range(RANKS)):
            assert read == [f"{number}.{rank}".encode() for rank in range(RANKS)]


def test_nothing_of_earlier_attempts_is_read(connect):
    for number in range(5):
        attempt(connect, number)


def test_processes_of_an_attempt_that_ended_before_it_met(connect):
    for rank in (1, 3):
        connect().set(f"dso/process/{rank}", "ended")
    with pytest.raises(dist.DistError, match="0 of 3 other processes"):
        store_of_attempt(connect(), 0, RANKS, 0.1)
    attempt(connect, 0)
