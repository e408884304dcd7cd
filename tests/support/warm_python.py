"""Python processes that start in milliseconds: forked from a process that has imported torch, Transformers and this package.

For tests that need a separate process but do not test how it starts. Tests of imports, of environment variables that libraries
read when they are loaded, and of a process's total memory use `subprocess`.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOADED = [
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "deepseek_optimizer.serving",
    "deepseek_optimizer.server.app",
    "deepseek_optimizer_cli.app",
]
DSO = "from deepseek_optimizer_cli.app import main; main()"


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class WarmPython:
    """`python -c CODE ARGUMENTS...` in its own session, with the interface of `subprocess.Popen` that the tests use.

    Args:
        code: a program.
        arguments: its arguments.
        input: its standard input, of at most 64 KiB.
        environment: environment variables to change; None: this process's.

    Attributes:
        pid: its process id, also that of its process group.
        stdout, stderr: its output as text.
        returncode: its exit code once it has ended, as in `subprocess`.
    """

    def __init__(self, code: str, *arguments: object, input: str = "", environment: Mapping[str, str] | None = None) -> None:
        context = _context()
        (source, writer), (out, out_end), (err, err_end) = (context.Pipe(duplex=False) for _ in range(3))
        variables = {**os.environ, **(environment or {})}
        ends = (source, out_end, err_end)
        self._process = context.Process(target=_main, args=(code, [*map(str, arguments)], variables, os.getcwd(), ends))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        for end in ends:
            end.close()
        with writer:
            os.write(writer.fileno(), input.encode())
        self.stdout, self.stderr = _reader(out), _reader(err)

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the process if it still runs."""
        if self.poll() is None:
            self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """Reads both outputs to their ends, and waits for the process, which is killed after `timeout` seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            out, err = pool.map(io.TextIOWrapper.read, (self.stdout, self.stderr))
        self.wait()
        timer.cancel()
        return out, err


def run(code: str, *arguments: object, timeout: float = 120.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, see `WarmPython`."""
    process = WarmPython(code, *arguments, **options)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess([code, *map(str, arguments)], process.returncode, out, err)


def _reader(pipe: Connection) -> io.TextIOWrapper:
    with pipe:
        return open(os.dup(pipe.fileno()), encoding="utf-8")


def _main(code: str, arguments: list[str], variables: dict[str, str], folder: str, streams: tuple[Connection, ...]) -> None:
    os.setsid()
    for number, pipe in enumerate(streams):
        with pipe:
            os.dup2(pipe.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
