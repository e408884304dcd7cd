"""The results of a batch job: one line per request, in the order of the input, whenever and however often the job was stopped.

While a job runs, results are appended to `<output>.partial` in the order in which they are ready. Its first line identifies the
job. A job that was stopped, even by kill -9, continues with the requests that have no complete line there. In the end the lines
are written to the output in order, in one step, and the partial file is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..checkpoint.atomic import atomic_file
from ..checkpoint.locks import HAS_LOCKS, hold
from ..errors import DataError

_HEAD = b'{"job":'
_SYNC_SECONDS = 2.0  # results of the last seconds may be lost if the machine stops, and are computed again


class Results:
    """The results of a job that runs; a context manager.

    Args:
        output: the file to write. It must not exist.
        job: what identifies the job, of JSON types; a partial file of another job is an error.
        count: number of requests.
        written: when the input was written, in seconds of the Unix clock, if this is the job's first run.

    Attributes:
        done: the indices of requests that have results.
        failed: those of them whose result is an error.
        written: when the input was written, as the job's first run saw it.
        size: bytes of the results that there are.

    Raises:
        DataError: the output exists, the partial file is of another job, or another process has it open.
    """

    def __init__(self, output: Path, job: dict[str, Any], count: int, written: int = 0) -> None:
        self.output, self.partial, self.count = output, output.with_name(output.name + ".partial"), count
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.written = written
        self.size = 0
        self._places: dict[int, tuple[int, int]] = {}  # offset and bytes of each result in the partial file
        self._job, self._synced = job, time.monotonic()
        check_free(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._file: BinaryIO = opened.enter_context(self.partial.open("a+b"))
            if HAS_LOCKS:
                try:
                    opened.callback(os.close, hold(self.partial))
                except BlockingIOError:
                    raise DataError("another process is running this job; wait for it, or stop it", file=self.partial) from None
            try:
                check_free(output)  # again: another process may have ended this job since
            except DataError:
                if not self.partial.stat().st_size:
                    self.partial.unlink()
                raise
            self._resume()
            self._opened = opened.pop_all()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def _resume(self) -> None:
        self._file.seek(0)
        head = self._file.readline()
        if not head.endswith(b"\n") and _HEAD.startswith(head[: len(_HEAD)]):  # new, or stopped while it was created
            self._file.truncate(0)
            self._write({"job": self._job, "written": self.written})
            return
        try:
            value = json.loads(head)
            known, self.written = dict(value["job"]), int(value["written"])
        except (ValueError, TypeError, KeyError):
            raise DataError("this is not the partial file of a batch job; delete it", file=self.partial) from None
        if different := sorted(k for k in known.keys() | self._job.keys() if known.get(k) != self._job.get(k)):
            raise DataError(
                f"a job with another {' and '.join(different)} was stopped here; start that one again to finish it, or delete "
                "this file",
                file=self.partial,
            )
        end = self._file.tell()
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                value = json.loads(line)
                self._place(value["index"], value["line"], end, len(line))
            except (ValueError, TypeError, KeyError):
                break  # a power failure may leave zeros
            end += len(line)
        self._file.truncate(end)  # what was being written when the job was stopped

    def _place(self, index: int, line: dict[str, Any], begin: int, size: int) -> None:
        self.done.add(index)
        self._places[index] = begin, size
        self.size += size
        if line["response"]["status_code"] != 200:
            self.failed.add(index)

    def _write(self, value: dict[str, Any]) -> int:
        line = encoded(value)
        self._file.write(line)
        self._file.flush()
        return len(line)

    def add(self, index: int, line: dict[str, Any]) -> None:
        """Adds the result of a request: the line of the output."""
        begin = self._file.seek(0, os.SEEK_END)
        self._place(index, line, begin, self._write({"index": index, "line": line}))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The results that there are, in the order of the requests."""
        for index in sorted(self._places):
            begin, size = self._places[index]
            self._file.seek(begin)
            yield json.loads(self._file.read(size))["line"]

    def finish(self) -> None:
        """Writes the output, which needs the results of all requests, and deletes the partial file."""
        assert len(self.done) == self.count
        with atomic_file(self.output) as out:
            for line in self.lines():
                out.write(encoded(line))
        self.partial.unlink()


def check_free(output: Path) -> None:
    """Raises a DataError if the output of a job exists."""
    if output.exists():
        raise DataError("the file exists; delete it, or choose another name", file=output)


def files_digest(path: Path) -> str:
    """A digest of the names, sizes and times of the files of a model: a file, or a directory without its subdirectories."""
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    stats = [(one.name, one.stat()) for one in files]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()


def encoded(value: dict[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
