"""Work that may run away, in a process of its own: text from clients is compiled there, and templates of checkpoints run there.

A worker starts at its first job, takes one at a time, and is started anew after it died. A job that takes more CPU time or
memory than it may ends its worker and nothing else. A worker that somebody else ends (the kernel when memory is short, an
operator) says nothing about its job, which a new one gets once more. Jobs and answers travel as JSON, so that not even a worker
that was taken over can make its parent run anything. The child ends when its pipe does: with `close`, or with this process,
however it ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import EngineBusyError, WorkerLostError

_CHILD = Path(__file__).with_name("child.py")
_HEADER = 8  # bytes before each message: how long it is
_START_SECONDS = 60.0  # imports, on a busy machine
_WALL = 10  # times the CPU time that a job may take on the clock: the machine may have other things to do
_ENDING_SECONDS = 10.0  # from the end of its answers to its own: the kernel frees its memory meanwhile
_TIMED_OUT = -signal.SIGPROF  # by its own timer
# Codes of a process that others ended. The other signals, such as SIGSEGV and SIGABRT, come of what the job made a library do.
_FROM_OUTSIDE = frozenset(-s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
_TRIES = 2  # of a job whose worker others end


class JobError(Exception):
    """The job said no; the message is for whoever asked."""


class WorkerError(Exception):
    """The job ended its worker: it took too long, or too much memory."""


class _TooSlow(WorkerLostError):
    """It would be so a second time."""


class Worker:
    """
    Args:
        job: a Python file that imports nothing of this package. `prepare(setup)` returns the function that is called with each
            payload; ValueError from it becomes a JobError.
        setup: for `prepare`, JSON.
        seconds: of CPU time that a job may take.
        memory: bytes that a job may take beside what the worker needs to be there.
        patience: seconds that a call waits for those before it.
        nice: what the process adds to its niceness, so that long jobs leave the cores to answers that are being written.
    """

    def __init__(
        self, job: Path, setup: Mapping[str, Any], *, seconds: float = 5.0, memory: int = 1 << 29, patience: float = 10.0,
        nice: int = 0,
    ) -> None:  # fmt: skip
        self._setup = {
            "job": str(job), "setup": setup, "path": sys.path, "seconds": seconds, "memory": memory, "nice": nice,
        }  # fmt: skip
        self._seconds, self._patience = seconds, patience
        self._lock, self._waiting = threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return self._process.pid if self._process else None

    def call(self, payload: Any) -> Any:
        """What the job answers; blocks.

        Raises:
            JobError: the job refused the payload.
            WorkerError: it ended its worker. The next call has a new one.
            WorkerLostError: its worker did not start, or something else ended it, twice; or it got too little of the machine's
                time to use its own.
            EngineBusyError: others' jobs took all of `patience`.
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
        """Starts the process where there is none, and waits until it takes jobs; raises as `call` does, after one try."""
        with self._lock:
            if not self._closed:
                self._start()

    def close(self) -> None:
        """Ends the process and waits for it; a job that runs ends with a WorkerError. May be called twice."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it was ended while it had nothing to do
        if self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the terminal is for this process to handle
            )
        except OSError as error:  # no file descriptor, process or memory left
            raise WorkerLostError(f"a worker process could not be started: {error.strerror}") from None
        try:
            self._exchange(self._setup, _START_SECONDS)
        except WorkerError as error:  # nobody's job was in it
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
            process.stdin.write(len(data).to_bytes(_HEADER, "little") + data)
            process.stdin.flush()
            deadline = time.monotonic() + seconds
            size = int.from_bytes(self._read(_HEADER, deadline), "little")
            return json.loads(self._read(size, deadline))
        except TimeoutError:
            self._end()
            raise _TooSlow(f"a worker process was not done in {seconds:g} s on the clock: the machine is too busy") from None
        except (OSError, EOFError):
            code = self._end(_ENDING_SECONDS)
            if code in _FROM_OUTSIDE:
                raise WorkerLostError(f"something ended a worker process with signal {-code}") from None
            late = f"it takes too long, more than {self._seconds:g} s"
            raise WorkerError(late if code == _TIMED_OUT else "it failed") from None

    def _read(self, size: int, deadline: float) -> bytes:
        process = self._process
        assert process is not None and process.stdout is not None
        poll = select.poll()  # unlike select, for any number of open files
        poll.register(process.stdout, select.POLLIN)
        parts, missing = [], size
        while missing:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), missing)
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _end(self, grace: float = 0.1) -> int | None:
        """Ends the process.

        Args:
            grace: seconds for it to end by itself: its code says why.

        Returns: its code, negative where a signal ended it; None where it had to be killed.
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
                pass  # what was still to be written
        return code
