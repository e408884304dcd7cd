"""A device of backend `cuda` that records what it is asked to do, on Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided")


class RecordingDevice:
    """Implements `Device`. A captured step is the list of its launches with the memory that they were given: nothing else
    reaches a replay, as with a CUDA graph. Memory that was allocated during a capture is filled with NaN before each replay,
    since other graphs use it too.

    Attributes:
        events: in order, "upload", "download", "mark", "arrived" (the host waited for a mark), "capture", "replay N" (the Nth
            captured step) and "wait"; outside of a capture also the name of every kernel that was launched, and "torch.NAME"
            for every operation of torch, other than views.
    """

    captures = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.events: list[str] = []
        self._tape: list[Callable[[], None]] | None = None
        self._captured = 0
        self._arriving: list[Callable[[], Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        launch = InterpretedFunction.run
        InterpretedFunction.run = lambda function, *args, **kwargs: self._launched(  # type: ignore[method-assign]
            function.fn.__name__, lambda: launch(function, *args, **kwargs)
        )
        try:
            with _Operations(self):
                yield
        finally:
            InterpretedFunction.run = launch  # type: ignore[method-assign]

    def staging(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.full((size,), -1, dtype=torch.int32)

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        self.events.append("upload")
        with _disable_current_modes():
            target.copy_(host)
            host.fill_(-1)  # a later look at the host would not find the step

    def download(self, source: torch.Tensor, host: torch.Tensor) -> None:
        self.events.append("download")
        with _disable_current_modes():
            made = source.clone()
        self._arriving.append(lambda: host.copy_(made))

    def mark(self) -> Callable[[], None]:
        self.events.append("mark")
        return self._arrive

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        self._tape = tape = []
        try:
            launch()
        finally:
            self._tape = None
        number, self._captured = self._captured, self._captured + 1

        def replay() -> None:
            self.events.append(f"replay {number}")
            with _disable_current_modes(), torch.inference_mode():  # a real replay writes to any tensor
                for play in tape:
                    play()

        return replay

    def wait(self) -> None:
        self.events.append("wait")
        self._copy_arriving()

    def _arrive(self) -> None:
        self.events.append("arrived")
        self._copy_arriving()

    def _copy_arriving(self) -> None:
        with _disable_current_modes():
            while self._arriving:
                self._arriving.pop()()

    def _launched(self, name: str, launch: Callable[[], None]) -> None:
        if self._tape is not None:
            self._tape.append(launch)
            return
        self.events.append(name)
        with _disable_current_modes():
            launch()

    def operation(self, name: str, run: Callable[[], Any]) -> Any:
        """Runs an operation of torch, and records it."""
        result = run()
        if self._tape is None:
            self.events.append(f"torch.{name}")
        elif name not in _ALLOCATES:
            self._tape.append(lambda: _into(result, run()))
        elif result.is_floating_point():
            self._tape.insert(0, lambda: result.fill_(torch.nan))
        return result


class _Operations(TorchDispatchMode):
    """Reports every operation of torch that is not a view."""

    def __init__(self, device: RecordingDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.is_view or name == "detach":
            return func(*args, **(kwargs or {}))
        return self._device.operation(name, lambda: func(*args, **(kwargs or {})))


def _into(held: Any, made: Any) -> None:
    """Results of a replayed operation are where they were when it was captured."""
    if isinstance(held, tuple):
        for pair in zip(held, made, strict=True):
            _into(*pair)
    elif made is not held:
        held.copy_(made)
