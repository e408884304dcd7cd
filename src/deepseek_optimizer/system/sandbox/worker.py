"""Runs untrusted work in a separate process: compiling text from clients, and templates from checkpoints.

A worker process starts with its first job, runs one job at a time, and is restarted after it has ended. A job that exceeds its
CPU time or memory only ends its worker. If the worker is killed from outside (by the kernel when memory is short, or by an
operator), the job is not to blame and is tried once more in a new process. Jobs and answers are exchanged as JSON, so that even
a compromised worker cannot make its parent execute code. The child ends when its pipe is closed: by `close`, or when this
process ends for any reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import EngineBusyError, WorkerLostError
from .platforms import PLATFORMS, here, send_message

_CHILD = Path(__file__).with_name("child.py")
_START_SECONDS = 60.0  # maximum time for imports, on a busy machine
_WALL = 10  # maximum wall-clock time of a job, as a multiple of its CPU time: the machine may be busy
_ENDING_SECONDS = 10.0  # maximum time from the end of its output to the end of the process, while the kernel frees its memory
_TRIES = 2  # number of attempts of a job whose worker is killed from outside


class JobError(Exception):
    """The job refused its input; the message is for the user."""


class WorkerError(Exception):
    """The job ended its worker: it took too much time or memory, or crashed."""


class _TooSlow(WorkerLostError):
    """The job exceeded its wall-clock time; it is not tried again."""


class Worker:
    """A worker process for one kind of job.

    Args:
        job: path of a Python file that does not import this package. Its `prepare(setup)` returns a function that is called
            with each payload; a ValueError from it becomes a JobError.
        setup: argument of `prepare`, as JSON types.
        seconds: maximum CPU time of a job.
        memory: maximum memory of a job in bytes, in addition to that of the idle worker.
        patience: maximum seconds that a call waits for earlier calls.
        nice: increase of the process's niceness, so that running requests have precedence over long jobs.
        platform: how the process is run and limited, a name in `platforms.PLATFORMS`; None: as this system allows.
    """

    def __init__(
        self, job: Path, setup: Mapping[str, Any], *, seconds: float = 5.0, memory: int = 1 << 29, patience: float = 10.0,
        nice: int = 0, platform: str | None = None,
    ) -> None:  # fmt: skip
        self._setup = {
            "job": str(job), "setup": setup, "path": sys.path, "seconds": seconds, "memory": memory, "nice": nice,
        }  # fmt: skip
        self._seconds, self._patience, self._nice = seconds, patience, nice
        self._platform_name = platform or here()
        self._platform = PLATFORMS[self._platform_name]()
        self._lock, self._waiting = threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id; None while there is no process."""
        return self._process.pid if self._process else None

    def call(self, payload: Any) -> Any:
        """Runs a job and returns its result; blocks.

        Args:
            payload: input of the job, as JSON types.

        Raises:
            JobError: the job refused the payload.
            WorkerError: the job ended its worker. The next call starts a new one.
            WorkerLostError: the worker could not be started, or was killed from outside, in two attempts; or the machine was
                too busy to run the job in time.
            EngineBusyError: earlier calls took longer than `patience`.
        """
        self._waiting += 1
        try:
            if not self._lock.acquire(timeout=self._patience):
                raise EngineBusyError(self._waiting, self._patience)
        finally:
            self._waiting -= 1
        try:
            for tries in range(1, _TRIES + 1):
                if self._closed:
                    raise WorkerError("it is closed")
                try:
                    return self._ask(payload)
                except WorkerLostError as error:
                    if (tries == _TRIES or isinstance(error, _TooSlow)) and not self._closed:
                        raise
            raise WorkerError("it is closed")
        finally:
            self._lock.release()

    def start(self) -> None:
        """Starts the process if there is none, and waits until it is ready; raises as `call` does, after one attempt."""
        with self._lock:
            if not self._closed:
                self._start()

    def close(self) -> None:
        """Ends the process and waits for it; a running call raises WorkerError. May be called twice."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it was killed while idle
        if self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), self._platform_name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                **self._platform.options(self._nice),
            )
        except OSError as error:  # no free file descriptor, process or memory
            raise WorkerLostError(f"a worker process could not be started: {error.strerror}") from None
        if self._closed:  # `close` has not seen this process
            self._process.kill()
            self._end()
            raise WorkerError("it is closed")
        try:
            self._exchange(self._setup, _START_SECONDS)
        except WorkerError as error:  # not caused by a job
            raise WorkerLostError(f"a worker process could not be started: {error}") from None

    def _ask(self, payload: Any) -> Any:
        self._start()
        kind, value = self._exchange(payload, self._seconds * _WALL)
        if kind == "refused":
            raise JobError(value)
        if kind == "memory":
            self._end()
            raise WorkerError("it takes too much memory")
        return value

    def _exchange(self, message: Any, seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        data = json.dumps(message).encode()
        try:
            send_message(process.stdin, data)
            return json.loads(self._platform.read_message(process.stdout, time.monotonic() + seconds))
        except TimeoutError:
            self._end()
            raise _TooSlow(f"a worker process did not finish in {seconds:g} s: the machine is too busy; try again") from None
        except (OSError, EOFError):
            code = self._end(_ENDING_SECONDS)
            if code is not None and code in self._platform.from_outside:
                raise WorkerLostError(f"a worker process was killed from outside with signal {-code}; try again") from None
            late = f"it takes too long, more than {self._seconds:g} s"
            raise WorkerError(late if code == self._platform.timed_out else "it failed") from None

    def _end(self, grace: float = 0.1) -> int | None:
        """Ends the process.

        Args:
            grace: seconds for it to end by itself, to get its exit code.

        Returns: its exit code, negative if a signal ended it; None if it had to be killed.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        code: int | None
        try:
            code = process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                pass  # unwritten data
        return code
