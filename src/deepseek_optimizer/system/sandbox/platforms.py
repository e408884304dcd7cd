"""What worker processes need from the system, and how systems differ in it.

`Posix` limits a job's CPU time by a timer of the kernel, and on Linux its memory. `Portable` needs nothing that Windows lacks:
a thread of the worker measures the CPU time. Each class has the side of the parent and that of the worker, which loads this
file by its path; so it imports the standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_HEADER = 8  # bytes before each message, which contain its length
_LATE = 124  # exit code of a worker that has used up its CPU time, where no signal says so: as that of `timeout`
_SHORTEST = 0.01  # seconds from one look at the CPU time to the next


class Posix:
    """Linux and macOS.

    Attributes:
        timed_out: exit code of a worker whose job used up its CPU time, as `subprocess` reports it.
        from_outside: exit codes after a kill from outside. Other signals, such as SIGSEGV and SIGABRT, are caused by the job.
        unenforced: a limit that the system does not have, for a message; None: it has all.
    """

    def __init__(self) -> None:
        self.timed_out = -signal.SIGPROF
        outside = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        self.from_outside = frozenset(-number for number in outside)
        linux = sys.platform == "linux"
        self.unenforced = None if linux else "the memory of worker processes is not limited on this system"

    # The parent's side.

    def options(self, nice: int) -> dict[str, Any]:
        """Arguments of `Popen`."""
        return {"start_new_session": True}  # Ctrl-C at the terminal is handled by the parent

    def read_message(self, pipe: IO[bytes], deadline: float) -> bytes:
        """The next message of a worker.

        Args:
            pipe: its output.
            deadline: on the clock of `time.monotonic`.

        Raises:
            TimeoutError: the deadline passes first.
            EOFError: the worker has closed its output.
            OSError: it cannot be read.
        """
        poll = select.poll()  # unlike select, works with any number of open files
        poll.register(pipe, select.POLLIN)

        def wait() -> None:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError

        return _message(pipe, wait)

    # The worker's side.

    def begin(self) -> None:
        """Called when the process begins."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def give_way(self, nice: int) -> None:
        """Lowers the priority of this process by `nice`."""
        os.nice(nice)
        try:  # with autogroups, the kernel schedules by session first and applies niceness only within one
            with open("/proc/self/autogroup", "w", encoding="ascii") as file:
                file.write(str(nice))
        except OSError:
            pass

    def limit_memory(self, more: int) -> None:
        """Limits the address space to its current size plus `more` bytes, on Linux."""
        if sys.platform != "linux":
            return
        with open("/proc/self/statm", encoding="utf-8") as file:
            pages = int(file.read().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def begin_job(self, seconds: float) -> None:
        """Ends the process when it has used so much CPU time, unless `end_job` is called before."""
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, whatever it is executing

    def end_job(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Portable:
    """Windows. Attributes and methods as those of `Posix`.

    A job that never lets other threads of Python run ends by its wall-clock time, which the parent watches. A worker that is
    killed from outside cannot be told from one that its job has ended.
    """

    timed_out = _LATE
    from_outside: frozenset[int] = frozenset()
    unenforced = (
        "the memory of worker processes is not limited on this system, and the CPU time of a job in native code only by ten "
        "times as much wall-clock time"
    )

    def __init__(self) -> None:
        self._ended = threading.Event()

    # The parent's side.

    def options(self, nice: int) -> dict[str, Any]:
        import subprocess  # not in the worker, which starts sooner without it

        # The flags exist on Windows only. The first keeps Ctrl-C from the worker.
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        return {"creationflags": flags | (getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) if nice else 0)}

    def read_message(self, pipe: IO[bytes], deadline: float) -> bytes:
        got: list[bytes | Exception] = []

        def read() -> None:
            try:
                got.append(_message(pipe, lambda: None))
            except Exception as error:
                got.append(error)

        thread = threading.Thread(target=read, daemon=True)  # after a timeout, it ends with the worker
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        if not got:
            raise TimeoutError
        if isinstance(got[0], Exception):
            raise got[0]
        return got[0]

    # The worker's side.

    def begin(self) -> None:
        pass

    def give_way(self, nice: int) -> None:
        pass  # see `options`

    def limit_memory(self, more: int) -> None:
        pass

    def begin_job(self, seconds: float) -> None:
        self._ended = threading.Event()
        threading.Thread(target=_watch, args=(self._ended, time.process_time() + seconds), daemon=True).start()

    def end_job(self) -> None:
        self._ended.set()


Platform = Posix | Portable
PLATFORMS: dict[str, Callable[[], Platform]] = {"posix": Posix, "portable": Portable}


def here() -> str:
    """The name of this system's way in `PLATFORMS`."""
    return "posix" if resource is not None and hasattr(signal, "setitimer") and hasattr(select, "poll") else "portable"


def send_message(pipe: IO[bytes], data: bytes) -> None:
    """Writes a message that `read_message` or `next_message` reads."""
    pipe.write(len(data).to_bytes(_HEADER, "little") + data)
    pipe.flush()


def next_message(pipe: IO[bytes]) -> bytes | None:
    """The next message, at any time; None: the other side has closed the pipe."""
    header = pipe.read(_HEADER)
    return pipe.read(int.from_bytes(header, "little")) if len(header) == _HEADER else None


def _watch(ended: threading.Event, until: float) -> None:
    """Ends the process when its CPU time reaches `until`, unless the job ends before."""
    left = until - time.process_time()
    while not ended.wait(max(left, _SHORTEST)):
        if (left := until - time.process_time()) <= 0:
            os._exit(_LATE)


def _message(pipe: IO[bytes], wait: Callable[[], None]) -> bytes:
    """Reads a message past the pipe's buffer. wait: called before each read."""

    def read(size: int) -> bytes:
        parts, missing = [], size
        while missing:
            wait()
            part = os.read(pipe.fileno(), missing)
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    return read(int.from_bytes(read(_HEADER), "little"))
