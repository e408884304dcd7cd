"""Several workers: a long job does not block the others, and a free worker takes the next job."""

from __future__ import annotations

import os
import threading

import pytest

from deepseek_optimizer.errors import EngineBusyError
from deepseek_optimizer.system.sandbox.pool import WorkerPool
from deepseek_optimizer.system.sandbox.worker import WorkerError
from support.live_server import wait_for

JOB = """
import os, time
def prepare(setup):
    def run(payload):
        while payload and not os.path.exists(payload): time.sleep(0.005)
        if payload is None: os._exit(3)
        return os.getpid()
    return run
"""


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    made = WorkerPool(path, {}, 2, patience=0.2)
    yield made
    made.close()


def test_a_long_job_does_not_block_the_other_worker(pool, tmp_path):
    end, answers = tmp_path / "end", []
    thread = threading.Thread(target=lambda: answers.append(pool.call(str(end))))
    thread.start()
    wait_for(lambda: pool.pids, 30)
    other = pool.call("")  # answered while the first is running
    second = threading.Thread(target=lambda: answers.append(pool.call(str(end))))
    second.start()
    wait_for(lambda: not pool._idle)
    with pytest.raises(EngineBusyError):  # both are busy
        pool.call("")
    end.touch()
    thread.join()
    second.join()
    assert set(pool.pids) == set(answers) and other in answers and len(pool.pids) == 2


def test_workers_start_on_demand_or_in_advance(pool):
    assert pool.call("") == pool.call("") and len(pool.pids) == 1
    pool.start()
    assert len(pool.pids) == 2


def test_callers_wait_for_a_replacement_worker(pool):
    first = pool.call("")
    with pytest.raises(WorkerError):
        pool.call(None)
    assert len(pool.pids) == 1 and pool.pids != [first]  # the replacement exists before the caller gets its error
    os.kill(pool.pids[0], 0)


def test_close_ends_all_workers(pool):
    pool.start()
    pool.close()
    assert not pool.pids
    with pytest.raises(WorkerError, match="closed"):
        pool.call("")
