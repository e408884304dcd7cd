"""The device that a plan runs on: streams, copies and graphs. Everything else of a step is launched by Triton.

Plans use only the interface `Device`, so that tests can put a device in its place that records what it is asked to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one, on which Triton launches, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Device(Protocol):
    """A device with a stream of its own, on which everything runs in the order in which it was asked for.

    Attributes:
        device: torch's device.
        captures: whether `capture` is supported.
    """

    device: torch.device
    captures: bool

    def step(self) -> AbstractContextManager[object]:
        """A context for one step: no other thread is in one, and Triton launches on this device. An error leaves it only when
        everything has been done, so that memory of `staging` may change."""

    def staging(self, size: int) -> torch.Tensor:
        """Memory of the host, int32 [size], from and to which is copied without another copy."""

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        """Begins to copy memory of `staging` to the device. The host's must not change before `wait` has returned."""

    def download(self, source: torch.Tensor, host: torch.Tensor) -> None:
        """Begins to copy from the device to memory of `staging`, which has been written when `wait` has returned."""

    def mark(self) -> Callable[[], None]:
        """Marks what has been asked for so far. Returns a function that returns when all of it has been done, while the device
        goes on with what was asked for since."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Records what a function launches, without running it.

        Args:
            launch: launches kernels on memory whose addresses stay the same. The device has run the same kernels before, so
                that none is compiled now. What it allocates shares memory with all other graphs of the device: a result is
                valid until another graph is replayed.

        Returns: launches all of it again.
        """

    def wait(self) -> None:
        """Returns when everything has been done."""


# A capture waits for the whole device first, which would be an error during another one, of whatever model.
_CAPTURING = threading.Lock()


class CudaDevice:
    """Implements `Device` with a stream of its own and CUDA graphs.

    Other models of the process have their own streams, and what the caller launches is on the caller's. A step waits on the
    device for what the calling thread had launched before it, such as a look at the logits of the step before, whose memory it
    may get; its own work is done when `wait` has returned.
    """

    captures = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stepping = threading.Lock()
        self._pool: Any = None  # the memory of all graphs
        self._own_stream: Any = None  # created in the first step

    @property
    def _stream(self) -> Any:
        if self._own_stream is None:
            self._own_stream = torch.cuda.Stream(self.device)
        return self._own_stream

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._stepping, launching_on(self.device):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                try:
                    yield
                except BaseException:
                    with suppress(RuntimeError):  # of the device: the first error is the one to report
                        self.wait()
                    raise

    def staging(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # later steps may write to it outside of inference mode
            return torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=True)

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(host, non_blocking=True)

    def download(self, source: torch.Tensor, host: torch.Tensor) -> None:
        host.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event: Any = torch.cuda.Event()
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Without a stream, torch captures on one that the whole process shares. What other threads do with the device
        # meanwhile, such as encoding pictures, is neither recorded nor an error.
        with _CAPTURING, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    def wait(self) -> None:
        self._stream.synchronize()


class InterpreterDevice:
    """Implements `Device` for Triton's interpreter on the CPU, which has no graphs."""

    captures = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stepping = threading.Lock()

    def step(self) -> AbstractContextManager[object]:
        return self._stepping

    def staging(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.int32, device="cpu")

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(host)

    def download(self, source: torch.Tensor, host: torch.Tensor) -> None:
        host.copy_(source)

    def mark(self) -> Callable[[], None]:
        return self.wait

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        raise NotImplementedError("Triton's interpreter has no graphs")

    def wait(self) -> None:
        """Does nothing: the interpreter is done when it returns."""


def device_of(device: torch.device) -> Device:
    """The implementation for a torch device."""
    return CudaDevice(device) if device.type == "cuda" else InterpreterDevice(device)
