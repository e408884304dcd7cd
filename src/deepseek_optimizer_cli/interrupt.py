"""Ctrl-C that stops an answer rather than the program."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_optimizer.chat.conversation import StopSignal


@contextmanager
def stop_on_interrupt() -> Iterator[StopSignal]:
    """Inside, the first Ctrl-C only sets the yielded `StopSignal`, so that the current step completes; the second one raises
    KeyboardInterrupt as usual, in case the step does not end."""
    from deepseek_optimizer.chat.conversation import StopSignal

    stop = StopSignal()

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stop.ask()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
