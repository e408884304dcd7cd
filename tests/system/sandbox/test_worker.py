"""Work in a separate process: a limit ends only that process, and none remains."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from deepseek_optimizer.errors import EngineBusyError, WorkerLostError
from deepseek_optimizer.system.sandbox.worker import JobError, Worker, WorkerError
from support.warm_python import WarmPython

JOB = """
import os, sys, time
def prepare(setup):
    print("what a job prints is no answer")
    def run(payload):
        kind = payload["kind"]
        if kind == "echo": return [setup, payload["value"]]
        if kind == "refuse": raise ValueError("no")
        if kind == "spin":
            while True: pass
        if kind == "memory": return len(bytearray(1 << 33))
        if kind == "die": os._exit(3)
        if kind == "crash": raise TypeError("a fault of the job")
        if kind == "sleep": time.sleep(payload["seconds"]); return None
        if kind == "deep": return run(payload)
        if kind == "killed":  # by somebody else, as often as asked
            with open(payload["log"], "a") as log: log.write("begun;")
            if open(payload["log"]).read().count(";") <= payload["times"]: os.kill(os.getpid(), payload["signal"])
            return "answered"
        if kind == "slow crash": os.closerange(3, 256); time.sleep(0.5); os.kill(os.getpid(), 11)
        if kind == "nice": return os.nice(0)
    return run
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


@pytest.fixture
def worker(job):
    made = Worker(job, {"a": 1}, seconds=0.3, patience=0.2)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_starts_with_the_first_job(worker):
    assert worker.pid is None
    value = {"text": "é👩 \0" * 50_000, "n": [1, None]}
    assert worker.call({"kind": "echo", "value": value}) == [{"a": 1}, value]
    pid = worker.pid
    assert worker.call({"kind": "echo", "value": 2}) == [{"a": 1}, 2] and worker.pid == pid


@pytest.mark.parametrize("kind", ["refuse", "deep"])
def test_a_failed_job_keeps_its_worker(worker, kind):
    with pytest.raises(JobError, match="no|nested"):
        worker.call({"kind": kind})
    pid = worker.pid
    worker.call({"kind": "echo", "value": 1})
    assert worker.pid == pid


@pytest.mark.parametrize(
    ("kind", "message"), [("spin", "too long"), ("memory", "too much memory"), ("die", "failed"), ("crash", "failed")]
)
def test_a_job_that_ends_its_worker_gets_a_replacement(worker, kind, message):
    worker.call({"kind": "echo", "value": 1})
    pid = worker.pid
    with pytest.raises(WorkerError, match=message):
        worker.call({"kind": kind})
    assert not alive(pid)
    assert worker.call({"kind": "echo", "value": 1}) == [{"a": 1}, 1] and worker.pid != pid


def test_a_worker_killed_while_idle_is_replaced(worker):
    worker.call({"kind": "echo", "value": 1})
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.call({"kind": "echo", "value": 1}) == [{"a": 1}, 1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_whose_worker_is_killed_runs_once_more(worker, tmp_path, number):
    log = tmp_path / "log"
    job = {"kind": "killed", "log": str(log), "times": 1, "signal": int(number)}
    assert worker.call(job) == "answered"
    assert log.read_text() == "begun;" * 2


def test_a_worker_killed_twice_is_not_the_jobs_fault(worker, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(WorkerLostError, match="signal 9"):
        worker.call({"kind": "killed", "log": str(log), "times": 9, "signal": int(signal.SIGKILL)})
    assert log.read_text() == "begun;" * 2
    assert worker.call({"kind": "echo", "value": 1}) == [{"a": 1}, 1]


def test_a_crash_is_the_jobs_fault(worker, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(WorkerError, match="failed"):
        worker.call({"kind": "killed", "log": str(log), "times": 9, "signal": int(signal.SIGSEGV)})
    assert log.read_text() == "begun;"


def test_a_slow_crash_is_the_jobs_fault_too(worker):
    with pytest.raises(WorkerError, match="it failed"):
        worker.call({"kind": "slow crash"})


def test_a_worker_that_does_not_start_is_not_the_jobs_fault(tmp_path):
    path = tmp_path / "job.py"
    path.write_text("raise SystemExit(1)")
    worker = Worker(path, {})
    with pytest.raises(WorkerLostError, match="could not be started"):
        worker.call({})
    worker.close()


def test_running_out_of_file_descriptors_is_not_the_jobs_fault(worker):
    """As with a small `ulimit -n`; a worker starts as soon as file descriptors are available."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(WorkerLostError, match="could not be started: Too many open files"):
            worker.call({"kind": "echo", "value": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert worker.call({"kind": "echo", "value": 2}) == [{"a": 1}, 2]


def test_a_job_without_cpu_time_is_not_at_fault_nor_retried(job):
    worker = Worker(job, {}, seconds=0.05)
    worker.call({"kind": "echo", "value": 1})
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match="did not finish in 0.5 s"):
        worker.call({"kind": "sleep", "seconds": 60})
    assert time.monotonic() - began < 30
    worker.close()


def test_a_worker_can_have_a_lower_priority(job):
    worker = Worker(job, {}, nice=3)
    assert worker.call({"kind": "nice"}) == min(19, os.nice(0) + 3)
    worker.close()


def test_callers_wait_for_each_other_up_to_a_limit(job):
    worker = Worker(job, {}, seconds=5, patience=0.2)
    worker.call({"kind": "echo", "value": 1})
    first = threading.Thread(target=worker.call, args=({"kind": "sleep", "seconds": 1.5},))
    first.start()
    while not worker._lock.locked():
        time.sleep(0.01)
    with pytest.raises(EngineBusyError):
        worker.call({"kind": "echo", "value": 1})
    first.join()
    assert worker.call({"kind": "echo", "value": 1}) == [{}, 1]
    worker.close()


def test_close_ends_a_running_job(job):
    worker = Worker(job, {}, seconds=60)
    worker.call({"kind": "echo", "value": 1})
    pid, errors = worker.pid, []

    def call():
        try:
            worker.call({"kind": "spin"})
        except WorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not worker._lock.locked():
        time.sleep(0.01)
    worker.close()
    thread.join()
    assert errors and not alive(pid)
    with pytest.raises(WorkerError, match="closed"):
        worker.call({"kind": "echo", "value": 1})


def test_children_end_with_their_parent(job):
    code = (
        "import time; from deepseek_optimizer.system.sandbox.worker import Worker; from pathlib import Path\n"
        f"w = Worker(Path({str(job)!r}), {{}}); w.call({{'kind': 'echo', 'value': 1}}); print(w.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with WarmPython(code) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    for _ in range(500):
        if not alive(pid) or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # there may be no process to reap it
            return
        time.sleep(0.02)
    pytest.fail("the child is still running")
