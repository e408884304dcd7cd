"""Calls that Ctrl-C does not interrupt: afterwards, the processes of a group would not agree on what they have done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Uninterrupted:
    """Runs functions of the main thread, the only one that Python interrupts, in a thread of its own."""

    def __init__(self) -> None:
        self._main = ThreadPoolExecutor(1, "dso-leader")

    def call(self, function: Callable[[], Result]) -> tuple[Result, KeyboardInterrupt | None]:
        """Calls a function; returns its result, and the interrupt to raise afterwards."""
        if threading.current_thread() is not threading.main_thread():
            return function(), None
        mode = torch.is_inference_mode_enabled()  # a thread has its own

        def in_mode() -> Result:
            with torch.inference_mode(mode):
                return function()

        try:
            future = self._main.submit(in_mode)
        except RuntimeError:  # the interpreter ends, and a finalizer releases memory
            return function(), None
        interrupt = None
        while True:
            try:
                return future.result(), interrupt
            except KeyboardInterrupt as error:
                interrupt = error
