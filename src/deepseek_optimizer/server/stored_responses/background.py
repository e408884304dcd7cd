"""Responses that are generated while no client waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class BackgroundTasks:
    """The running tasks, by owner and id of the response."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], tuple[asyncio.Task[None], Callable[[], None]]] = {}

    def start(self, owner: str, id: str, work: Coroutine[Any, Any, None], cancel: Callable[[], None]) -> None:
        """Starts a task.

        Args:
            owner: salt of the API key.
            id: of the response.
            work: generates and stores the response.
            cancel: makes `work` end early.
        """
        task = asyncio.ensure_future(work)
        self._tasks[owner, id] = task, cancel
        task.add_done_callback(lambda _: self._tasks.pop((owner, id), None))

    async def cancel(self, owner: str, id: str) -> bool:
        """Ends a task early and waits for it; returns whether there was one."""
        found = self._tasks.get((owner, id))
        if found is None:
            return False
        task, cancel = found
        cancel()
        await asyncio.wait({task})
        return True

    async def join(self) -> None:
        """Waits for all tasks."""
        if self._tasks:
            await asyncio.wait({task for task, _ in self._tasks.values()})
