"""Runs `dso serve` in a process of its own, for measurements and load tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendError

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/")
_SAMPLE = re.compile(r"^([\w:]+)(?:\{([^}]*)\})? (\S+)$")


class Served:
    """`with Served(model, "--no-drafts") as server: ...`; the server stops at the end.

    Args:
        model: the argument of `dso serve`.
        options: of `dso serve`.
        environment: variables added to this process's own.
        key: API key for `get` and `metrics`.

    Attributes:
        port: its port on 127.0.0.1.
        process: the server.
    """

    def __init__(
        self, model: str | Path, *options: str, environment: Mapping[str, str] | None = None, key: str | None = None
    ) -> None:
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.command = [sys.executable, "-m", "deepseek_optimizer", "serve", str(model), "--port", "0", *options]
        self._environment = {**os.environ, **(environment or {})}
        self.port = 0

    def __enter__(self) -> Served:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self._environment)
        try:
            self._wait(120.0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(45)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._folder.cleanup()

    def _wait(self, seconds: float) -> None:
        """Waits until it listens.

        Raises:
            BackendError: it ended or took too long; contains its output.
        """
        until = time.monotonic() + seconds
        while not (match := _ADDRESS.search(self.log)):
            if self.process.poll() is not None or time.monotonic() > until:
                raise BackendError(f"the server did not start; its output:\n{self.log}")
            time.sleep(0.05)
        self.port = int(match[1])

    @property
    def log(self) -> str:
        """Its output so far."""
        return self._log.read_bytes().decode("utf-8", "replace")

    @property
    def _log(self) -> Path:
        return Path(self._folder.name, "log")

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the server process."""
        if (size := resident(self.process.pid)) is None:
            raise OSError("the server has exited")
        return size

    @property
    def children(self) -> list[int]:
        """Ids of its running child processes."""
        lists = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted({int(child) for path in lists for child in path.read_text(encoding="utf-8").split()})

    def get(self, path: str) -> Any:
        """The JSON response of a GET request."""
        return json.loads(self._read(path))

    def metrics(self) -> dict[str, float]:
        """Prometheus metrics: name -> value, summed over labels, and `name{label=value}` -> value."""
        return parsed(self._read("/metrics").decode())

    def _read(self, path: str) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=self._headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            body: bytes = answer.read()
        return body


def resident(pid: int) -> int | None:
    """Resident memory of a process in bytes; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def parsed(text: str) -> dict[str, float]:
    """Parses Prometheus' text format; see `Served.metrics`."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if sample := _SAMPLE.match(line):
            name, labels, value = sample[1], sample[2] or "", float(sample[3])
            names = [name, *(f"{name}{{{label.replace(chr(34), '')}}}" for label in labels.split(",") if label)]
            for key in names:
                values[key] = values.get(key, 0.0) + value
    return values
