"""Progress of long operations: a bar on a terminal, a plain line every ten seconds elsewhere, nothing for short operations."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

FIRST_LINE_S = 2.0  # an operation that ends sooner prints no line
NEXT_LINE_S = 10.0


class Progress:
    """Progress of one operation. Call it with the units done and in total.

    Args:
        description: the operation, such as "Loading SmolLM2".
        clock: returns the time in seconds.
    """

    def __init__(self, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.description = description
        self.done, self.total, self.note = 0, 0, ""
        self._clock, self._start = clock, clock()
        self._first: tuple[float, int] | None = None  # time of the first call, and the units done by then

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Reports progress.

        Args:
            done, total: units done and in total, in any unit; a total of 0: unknown.
            note: text to show in addition, such as the current loss.
        """
        self.done, self.total, self.note = done, total, note or self.note
        if self._first is None:
            self._first = (self._clock(), done)

    def say(self, line: str) -> None:
        """Prints a line, on a terminal only."""

    @property
    def seconds(self) -> float:
        """Seconds since the start of the operation."""
        return self._clock() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left, at the rate since the first call; None until that is known, or if the total is unknown."""
        if not self.total or self._first is None or self.done <= self._first[1]:
            return None
        begun, units = self._first
        return (self._clock() - begun) * max(self.total - self.done, 0) / (self.done - units)

    def line(self) -> str:
        """Returns a line of text, such as "Loading model: 40%, 12 s left"."""
        parts = [f"{100 * self.done // self.total}%"] if self.total else []
        left = self.seconds_left
        parts.append(f"{duration(self.seconds)} elapsed" if left is None else f"{duration(left)} left")
        return f"{self.description}: {', '.join(parts)}" + (f" ({self.note})" if self.note else "")


class _Bar(Progress):
    """Progress shown as a bar on a terminal."""

    def __init__(self, description: str, bar: Any) -> None:
        super().__init__(description)
        self._bar, self._task = bar, bar.add_task(description, total=None, note="")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        super().__call__(done, total, note)
        self._bar.update(self._task, completed=done, total=total or None, note=self.note)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False)


@contextmanager
def show_progress(description: str, unit: Literal["steps", "bytes"] = "steps") -> Iterator[Progress]:
    """Shows the progress of the operation in the `with` block on stderr. Yields the `Progress` to call.

    Args:
        description: the operation, such as "Loading SmolLM2".
        unit: what is counted; a bar shows bytes as MB or GB.
    """
    if sys.stderr is None:  # closed
        yield Progress(description)
        return
    if sys.stderr.isatty():
        with _bar(unit) as bar:
            yield _Bar(description, bar)
        return
    progress, stop = Progress(description), threading.Event()
    writer = threading.Thread(target=_write_lines, args=(progress, stop, sys.stderr), name="progress", daemon=True)
    writer.start()
    try:
        yield progress
    finally:
        stop.set()
        writer.join()


def _bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counts = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _write_lines(progress: Progress, stop: threading.Event, stream: TextIO) -> None:
    """Prints lines until `stop` is set. Runs on its own thread, so that lines appear during steps that take minutes."""
    wait, written = FIRST_LINE_S, False
    try:
        while not stop.wait(wait):
            print(progress.line(), file=stream, flush=True)
            wait, written = NEXT_LINE_S, True
        if written:
            print(f"{progress.description}: done in {duration(progress.seconds)}", file=stream, flush=True)
    except (OSError, ValueError):  # the pipe or file is closed
        return


def duration(seconds: float) -> str:
    """Formats a duration, such as "8 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
