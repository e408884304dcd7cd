"""The way of running workers that needs nothing of POSIX, on this system: what Windows uses."""

from __future__ import annotations

import io
import os
import threading
import time

import pytest

from deepseek_optimizer.errors import WorkerLostError
from deepseek_optimizer.system.sandbox import platforms
from deepseek_optimizer.system.sandbox.pool import WorkerPool
from deepseek_optimizer.system.sandbox.worker import JobError, Worker, WorkerError
from support.live_server import wait_for

JOB = """
import os, re
def prepare(setup):
    print("what a job prints is no answer")
    def run(payload):
        kind = payload["kind"]
        if kind == "echo": return [setup, payload["value"]]
        if kind == "refuse": raise ValueError("no")
        if kind == "spin":
            while True: pass
        if kind == "native": return re.match("(a+)+$", "a" * 64 + "b")  # keeps other threads of Python from running
        if kind == "die": os._exit(3)
        if kind == "crash": raise TypeError("a fault of the job")
        if kind == "memory": raise MemoryError
        if kind == "deep": return run(payload)
    return run
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


@pytest.fixture
def worker(job):
    made = Worker(job, {"a": 1}, seconds=0.3, nice=3, platform="portable")
    yield made
    made.close()


def echo(worker, value=1):
    return worker.call({"kind": "echo", "value": value}) == [{"a": 1}, value]


def test_answers(worker):
    assert echo(worker, {"text": "é👩 \0" * 50_000, "n": [1, None]})
    pid = worker.pid
    for kind, message in (("refuse", "no"), ("deep", "nested")):
        with pytest.raises(JobError, match=message):
            worker.call({"kind": kind})
    assert echo(worker) and worker.pid == pid


@pytest.mark.parametrize(
    ("kind", "message"),
    [("spin", "it takes too long, more than 0.3 s"), ("die", "failed"), ("crash", "failed"), ("memory", "too much memory")],
)
def test_a_job_that_ends_its_worker_gets_a_replacement(worker, kind, message):
    assert echo(worker)
    pid = worker.pid
    with pytest.raises(WorkerError, match=message):
        worker.call({"kind": kind})
    assert echo(worker) and worker.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_time_of_earlier_jobs_does_not_count(worker):
    """A timer that has not been stopped would end the worker while it is idle or at its next job."""
    assert echo(worker)
    pid, until = worker.pid, time.monotonic() + 0.5
    while time.monotonic() < until:
        assert echo(worker)
    assert worker.pid == pid


def test_native_code_that_never_returns_ends_by_the_clock(job):
    worker = Worker(job, {"a": 1}, seconds=0.05, platform="portable")
    assert echo(worker)
    pid = worker.pid
    with pytest.raises(WorkerLostError, match="did not finish in 0.5 s"):
        worker.call({"kind": "native"})
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    worker.close()


def test_a_worker_killed_while_idle_is_replaced(worker):
    assert echo(worker)
    worker._process.kill()
    worker._process.wait()
    assert echo(worker)


def test_close_ends_a_running_job(job):
    pool, errors = WorkerPool(job, {"a": 1}, 1, seconds=60, platform="portable"), []

    def call():
        try:
            pool.call({"kind": "spin"})
        except WorkerError as error:
            errors.append(str(error))

    assert echo(pool)
    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: not pool._idle)
    pool.close()
    thread.join()
    assert errors == ["it is closed"] or errors == ["it failed"]


def test_what_is_not_enforced_is_said():
    assert "memory of worker processes is not limited" in platforms.Portable().unenforced


@pytest.mark.parametrize("missing", ["resource", "setitimer", "poll"])
def test_the_system_decides(monkeypatch, missing):
    assert platforms.here() == "posix"
    if missing == "resource":
        monkeypatch.setattr(platforms, "resource", None)
    else:
        monkeypatch.delattr(platforms.signal if missing == "setitimer" else platforms.select, missing)
    assert platforms.here() == "portable"


def test_a_message_that_was_cut_off():
    pipe = io.BytesIO()
    platforms.send_message(pipe, b"abc")
    assert platforms.next_message(io.BytesIO(pipe.getvalue())) == b"abc"
    assert platforms.next_message(io.BytesIO(pipe.getvalue()[:5])) is None
