"""Processes of `dso serve` for the suites, forked from one that has imported everything: the suites start dozens."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from support.warm_python import DSO, WarmPython

_ADDRESS = re.compile(rb"address +https?://[^/]*:(\d+)")
_STOP_SECONDS = 20.0
# The first argument is the log.
_SERVE = f"""\
import os, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
{DSO}
"""


class StartError(RuntimeError):
    """The server did not start; the message has the end of its log."""


class Served:
    """A running `dso serve`.

    Args:
        model: directory of the model.
        flags: command-line options. The port is chosen here.
        environment: variables in addition to those of this process.
        seconds: maximum time to start.

    Raises:
        StartError: it ended, or it took too long.
    """

    def __init__(
        self, model: Path | str, flags: Sequence[str] = (), environment: Mapping[str, str] | None = None, seconds: float = 120.0
    ) -> None:
        arguments = ["serve", str(model), "--port", "0", "--threads", "1", *flags]
        self.log: IO[bytes] = tempfile.NamedTemporaryFile(suffix=".log")
        self.process = WarmPython(_SERVE, self.log.name, *arguments, environment=environment)
        self.port = self._wait(seconds)
        self.url = f"http://127.0.0.1:{self.port}"

    def _wait(self, seconds: float) -> int:
        """The port, once the server listens."""
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            log = Path(self.log.name).read_bytes()
            if found := _ADDRESS.search(log):
                return int(found[1])
            if ended or time.monotonic() > until:
                self.stop()
                raise StartError(f"dso serve {'ended' if ended else 'did not start'}: {log[-2000:].decode(errors='replace')}")
            time.sleep(0.05)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends the process: two signals, so that requests in flight are not waited for."""
        for _ in range(2):
            if self.alive:
                self.process.terminate()
                time.sleep(0.05)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr, self.log):
            stream.close()


class Shared:
    """Keeps the latest server running for the next test that asks for the same one: starting takes seconds."""

    def __init__(self) -> None:
        self._key: object = None
        self._served: Served | None = None

    def get(self, model: Path | str, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> Served:
        """A server with these settings: the running one, or a new one in its place."""
        key = (str(model), tuple(flags), tuple(sorted((environment or {}).items())))
        if self._served is None or not self._served.alive or key != self._key:
            self.stop()
            self._served, self._key = Served(model, flags, environment), key
        return self._served

    def stop(self) -> None:
        if self._served is not None:
            self._served.stop()
        self._served = None
