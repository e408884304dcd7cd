"""Lets a server sleep after a time without requests; the next request wakes it."""

from __future__ import annotations

import asyncio
import time

from ..errors import EngineDeadError
from .http.problems import ApiError
from .state import ServerState

_CHECKS = 10  # per interval


async def sleep_when_idle(state: ServerState, seconds: float) -> None:
    """Watches a server until it is cancelled.

    Args:
        state: the server's.
        seconds: time without requests after which it sleeps.
    """
    while True:
        await asyncio.sleep(seconds / _CHECKS)
        if state.engine.admitted:
            state.used = time.monotonic()
        elif not state.sleeping and time.monotonic() - state.used >= seconds:
            try:
                await state.sleep(0, until_used=True)
            except (ApiError, EngineDeadError):  # it is shutting down, or has stopped
                return
