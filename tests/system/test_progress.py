"""Progress of long work: a bar on a terminal, lines elsewhere, nothing for quick work."""

from __future__ import annotations

import io
import re
import threading

import pytest

from deepseek_optimizer.system import progress as module
from deepseek_optimizer.system.progress import Progress, duration, show_progress


class Stream(io.StringIO):
    """A stream that signals when it has a given number of lines."""

    def __init__(self, terminal: bool = False, lines: int = 1) -> None:
        super().__init__()
        self.terminal, self.lines, self.enough = terminal, lines, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.getvalue().count("\n") >= self.lines:
            self.enough.set()
        return count


@pytest.fixture
def stderr(monkeypatch):
    def make(**options) -> Stream:
        stream = Stream(**options)
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return make


def at_once(monkeypatch):
    monkeypatch.setattr(module, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(module, "NEXT_LINE_S", 0.0)


def test_quick_work_prints_nothing_in_a_pipe(stderr):
    stream = stderr()
    with show_progress("Loading m") as progress:
        progress(1, 2)
        progress(2, 2)
    assert stream.getvalue() == ""


def test_long_work_gets_lines_in_a_pipe_and_its_duration_at_the_end(stderr, monkeypatch):
    at_once(monkeypatch)
    stream = stderr(lines=3)
    with show_progress("Loading m") as progress:
        progress(30, 120, "a note")
        assert stream.enough.wait(30)
    *lines, last = stream.getvalue().splitlines()
    assert len(lines) >= 3
    assert all(re.fullmatch(r"Loading m: (25%, )?\d+ s elapsed( \(a note\))?", line) for line in lines), lines
    assert re.fullmatch(r"Loading m: done in \d+ s", last)


def test_a_long_step_is_reported(stderr, monkeypatch):
    at_once(monkeypatch)
    stream = stderr()
    with show_progress("Downloading"):
        assert stream.enough.wait(30)
    assert stream.getvalue().startswith("Downloading: 0 s elapsed\n")


def test_no_thread_remains_even_after_an_error(stderr):
    stderr()
    with pytest.raises(KeyError), show_progress("Loading m"):
        raise KeyError
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_a_closed_stream_does_not_end_the_work(stderr, monkeypatch):
    at_once(monkeypatch)
    stderr().close()
    with show_progress("Loading m") as progress:
        progress(1, 2)


def test_a_terminal_gets_a_bar(stderr, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = stderr(terminal=True)
    with show_progress("Loading m") as progress:
        progress(3, 7, "loss 2.5")
        progress.say("step 3: half way")
    for part in ("Loading m", "3/7", "loss 2.5", "step 3: half way"):
        assert part in stream.getvalue()


def test_the_time_left_uses_the_rate_since_the_first_call():
    now = iter([0.0, 100.0, 130.0, 130.0, 130.0])
    progress = Progress("Training", lambda: next(now))
    progress(50, 100)  # resumed: the first half was done earlier
    progress(60, 100)
    assert progress.seconds_left == 120.0
    assert progress.line() == "Training: 60%, 2 min 0 s left"


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_unknown_total_has_no_time_left():
    progress = Progress("Reading", clock=iter(range(10)).__next__)
    progress(1, 0)
    progress(2, 0)
    assert progress.seconds_left is None and "left" not in progress.line()


def test_nothing_goes_to_stdout_if_stderr_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(module, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr("sys.stderr", None)
    with show_progress("Loading") as progress:
        progress(1, 2)
        assert "progress" not in [thread.name for thread in threading.enumerate()]
    assert capsys.readouterr().out == ""
