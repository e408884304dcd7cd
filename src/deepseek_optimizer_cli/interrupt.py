"""Ctrl-C that ends an answer and not the program."""

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
    """Inside, a first Ctrl-C only asks what was yielded to stop, so that the step in flight ends whole; a second one is the
    usual KeyboardInterrupt, for a step that does not end."""
    from deepseek_optimizer.chat.conversation import StopSignal

    stop = StopSignal()

    def note(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stop.ask()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
