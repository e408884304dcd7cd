"""A pool of workers for one job, so that a long call does not block others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import EngineBusyError, WorkerLostError
from .worker import Worker, WorkerError


class WorkerPool:
    """A pool of workers.

    Args:
        job, setup: as for `Worker`.
        count: maximum number of processes. Each starts with the first call that finds no other one idle, or with `start`.
        patience: maximum seconds that a call waits for an idle worker.
        limits: further arguments of `Worker`.
    """

    def __init__(self, job: Path, setup: Mapping[str, Any], count: int, *, patience: float = 10.0, **limits: Any) -> None:
        self._workers = [Worker(job, setup, patience=patience, **limits) for _ in range(count)]
        self._idle = list(self._workers)
        self._patience, self._waiting, self._closed = patience, 0, False
        self._lock, self._places = threading.Lock(), threading.Semaphore(count)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def call(self, payload: Any) -> Any:
        """Runs a job on an idle worker, as `Worker.call`.

        If the job ended its worker, the call waits until a new one has started, so that the next caller need not.
        """
        with self._lock:
            self._waiting += 1
        try:
            if not self._places.acquire(timeout=self._patience):
                raise EngineBusyError(self._waiting, self._patience)
        finally:
            with self._lock:
                self._waiting -= 1
        with self._lock:
            worker = next((w for w in self._idle if w.pid is not None), self._idle[0])
            self._idle.remove(worker)
        try:
            return worker.call(payload)
        except (WorkerError, WorkerLostError):
            if not self._closed:
                _start(worker)
            raise
        finally:
            with self._lock:
                self._idle.append(worker)
            self._places.release()

    def start(self) -> None:
        """Starts all workers, one after another; calls can use those that run already."""
        for _ in self._workers:
            if self._closed or not self._places.acquire(blocking=False):
                return
            with self._lock:
                worker = next((w for w in self._idle if w.pid is None), self._idle[0])
                self._idle.remove(worker)
            try:
                _start(worker)
            finally:
                with self._lock:
                    self._idle.append(worker)
                self._places.release()

    def close(self) -> None:
        """Ends all processes and waits for them; running calls raise WorkerError. May be called twice."""
        self._closed = True
        for worker in self._workers:
            worker.close()


def _start(worker: Worker) -> None:
    try:
        worker.start()
    except WorkerLostError:  # the next call tries again and raises the error
        pass
