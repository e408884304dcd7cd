"""One model of a pool: its file, whether it is loaded, and who uses it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import ASGIApp

from ..state import ServerState
from .model_list import ModelFile

Status = Literal["unloaded", "loading", "loaded", "unloading", "failed"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        state: of its routes; its engine runs.
        routes: the application with its routes.
        bytes: memory of its weights, and the maximum of its cache.
    """

    state: ServerState
    routes: ASGIApp
    bytes: int


class PooledModel:
    """
    Args:
        file: the checkpoint.
        pinned: whether it is loaded at the start and stays loaded.

    Attributes:
        loaded: None: it is not in memory.
        error: why it could not be loaded the last time; None: it could.
        failed: time of that, of `time.monotonic`.
        users: number of requests that use it.
        used: time of the last use.
        waiting: the requests that wait until a load has ended; the result says whether `enter` was called for them.
        loading: whether it is being loaded, or waits for its turn.
        leaving: the unloading in progress; new requests wait until it is loaded again.
    """

    def __init__(self, file: ModelFile, pinned: bool) -> None:
        self.file, self.pinned = file, pinned
        self.loaded: LoadedModel | None = None
        self.error: str | None = None
        self.failed = self.used = 0.0
        self.users = 0
        self.waiting: list[asyncio.Future[bool]] = []
        self.loading = False
        self.leaving: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether requests can use it now."""
        return self.loaded is not None and self.leaving is None and self.loaded.state.engine.alive

    @property
    def busy(self) -> bool:
        """Whether a request uses it, or its engine answers one in the background."""
        return self.users > 0 or (self.loaded is not None and self.loaded.state.engine.admitted > 0)

    @property
    def status(self) -> Status:
        if self.leaving is not None:
            return "unloading"
        if self.loaded is not None:
            return "loaded"
        if self.loading:
            return "loading"
        return "unloaded" if self.error is None else "failed"

    def enter(self) -> None:
        """Counts a request that uses it."""
        self.users += 1
        self._idle.clear()

    def leave(self) -> None:
        """Ends `enter`."""
        self.users -= 1
        self.used = time.monotonic()
        if not self.users:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until no request uses it."""
        await self._idle.wait()

    def settle(self, error: str | None) -> None:
        """Ends a load, and wakes the requests that wait for it. They are counted as users here: otherwise the model might be
        unloaded before they run.

        Args:
            error: why it could not be loaded; None: it could, or it was not tried.
        """
        self.loading, self.error = False, error
        if error is not None:
            self.failed = time.monotonic()
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if self.ready:
                self.enter()
            future.set_result(self.ready)

    async def entered(self, seconds: float) -> bool:
        """Waits until a load has ended, for at most `seconds`; returns whether it is loaded, and `enter` was called."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            await asyncio.wait({future}, timeout=max(0.01, seconds))
        except asyncio.CancelledError:
            if future.done() and future.result():
                self.leave()
            raise
        finally:
            if future in self.waiting:
                self.waiting.remove(future)
        return future.done() and future.result()

    def card(self) -> dict[str, Any]:
        """Its state in /v1/models."""
        status: dict[str, Any] = {"value": self.status, "failed": self.status == "failed", "pinned": self.pinned}
        if self.status == "failed":
            status["reason"] = self.error
        memory = None if self.loaded is None else self.loaded.bytes
        return {"status": status, "size_bytes": self.file.bytes or None, "memory_bytes": memory}
